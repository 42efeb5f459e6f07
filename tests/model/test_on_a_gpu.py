"""A whole model as a GPU computes it, its kernels interpreted: the same loss and gradients as on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, ObjectiveConfig, Remat
from cramjax.model import Objective, make_model, objective_for

from .small import LENGTH, MASK, SEPARATOR, VOCAB, batch, trained_like

_GPT = ModelConfig(
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    mlp=48,
    activation="relu2",
    norm="rmsnorm",
    norm_affine=False,
    qk_norm=True,
    logit_softcap=10.0,
    mask_documents=True,
)
_ENCODER = ModelConfig(
    layers=2,
    width=24,
    heads=2,
    mlp=20,
    activation="geglu",
    norm="layernorm",
    bias=True,
    positions="learned",
    embedding_norm=True,
    head_bias=True,
)
_MODELS = {"gpt": _GPT, "encoder": _ENCODER}


def build(name: str, remat: Remat, layer_loop: Any) -> tuple[Objective, Any, jax.Array]:
    """A model with its objective, its parameters and a batch."""
    causal = name == "gpt"
    model = make_model(
        _MODELS[name],
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        causal=causal,
        separator_id=SEPARATOR,
        layer_loop=layer_loop,
        remat=remat,
    )
    objective = ObjectiveConfig(kind="causal" if causal else "masked", z_loss=0.01)
    return objective_for(objective, model, mask_id=MASK), trained_like(model), batch(LENGTH + causal)


def loss_and_gradients(objective: Objective, params: Any, tokens: jax.Array) -> Any:
    """Of the mean over tokens."""

    def mean_loss(params: Any) -> jax.Array:
        loss = objective(params, tokens, jax.random.key(3), 0.3, True)
        return loss.total / loss.tokens

    # Not one function for both devices: what it is traced for is no argument.
    return jax.jit(lambda params: jax.value_and_grad(mean_loss)(params))(params)


def assert_near(got: Any, wanted: Any) -> None:
    """Equal but for the rounding of float32 sums; of each array, small entries are differences of large ones."""
    for (path, want), own in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        largest = float(jnp.abs(want).max())
        np.testing.assert_allclose(own, want, rtol=1e-5, atol=1e-5 * largest, err_msg=str(path))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Loss and gradients on a CPU."""
    return {name: loss_and_gradients(*build(name, "none", "scan")) for name in _MODELS}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", _MODELS)
def test_loss_and_gradients_are_those_of_a_cpu(
    plain: dict[str, Any], name: str, remat: Remat, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("on_an_h100")  # after what the CPU gives
    problem = build(name, remat, "auto" if remat == "none" else "scan")
    text = str(jax.make_jaxpr(lambda p: problem[0](p, problem[2], jax.random.key(3), 0.3, True).total)(problem[1]))
    kernels = {"gpt": ("heads_forward",), "encoder": ("geglu_forward",)}[name]
    assert all(kernel in text for kernel in (*kernels, "norm_forward", "attention_forward"))
    assert_near(loss_and_gradients(*problem), plain[name])
