"""The walk's gradients are those of the loss, whatever is recomputed, and it keeps no copy of the parameters."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, ObjectiveConfig, Remat
from cramjax.model import Objective, make_model, objective_for
from cramjax.training import walk

from ..model.small import CAUSAL, CONFIGS, LENGTH, MASK, SEPARATOR, VOCAB, batch, trained_like


def build(name: str, **changes: Any) -> tuple[Objective, Any, jax.Array]:
    """A small model with dropout, its parameters and a batch."""
    config: ModelConfig = dataclasses.replace(CONFIGS[name], **{"dropout": 0.1, **changes})
    causal = CAUSAL[name]
    model = make_model(
        config,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        causal=causal,
        separator_id=SEPARATOR,
        layer_loop="scan",
    )
    objective = ObjectiveConfig(kind="causal" if causal else "masked", z_loss=0.01)
    return objective_for(objective, model, mask_id=MASK), trained_like(model), batch(LENGTH + causal)


def collected(objective: Objective, params: Any, tokens: jax.Array, remat: Remat) -> Any:
    """The gradients that a walk hands out, put together, and the loss."""

    def block(layer: jax.Array, own: Any, gradients: Any, carry: Any) -> Any:
        del own
        put = jax.tree.map(lambda all, one: all.at[layer].set(one), carry["blocks"], gradients)
        return carry | {"blocks": put}

    visitor = walk.Visitor(
        read=lambda carry, layer: jax.tree.map(lambda p: p[layer], params["blocks"]),
        block=block,
        outer=lambda part, gradients, carry: carry | {part: gradients},
    )
    trace = walk.forward(objective, params, tokens, jax.random.key(3), 0.3, remat=remat)
    return walk.backward(objective, trace, params, visitor, jax.tree.map(jnp.zeros_like, params))


def differentiated(objective: Objective, params: Any, tokens: jax.Array) -> tuple[Any, Any]:
    """Gradients of the mean loss, and the loss."""

    def mean_loss(params: Any) -> tuple[jax.Array, Any]:
        loss = objective(params, tokens, jax.random.key(3), 0.3, True)
        return loss.total / loss.tokens, loss

    return jax.jit(jax.grad(mean_loss, has_aux=True))(params)


@functools.cache
def built_and_differentiated(name: str) -> tuple[Objective, Any, jax.Array, tuple[Any, Any]]:
    built = build(name)
    return *built, differentiated(*built)


def check(objective: Objective, params: Any, tokens: jax.Array, right: tuple[Any, Any], remat: Remat) -> None:
    expected, plain = right
    loss, gradients = jax.jit(collected, static_argnums=(0, 3))(objective, params, tokens, remat)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    # float32 sums in another order; of each array, small entries are differences of large ones.
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()), err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_every_model_are_those_of_the_loss(name: str) -> None:
    check(*built_and_differentiated(name), "full")


@pytest.mark.slow
@pytest.mark.parametrize("remat", [policy for policy in get_args(Remat) if policy != "full"])
@pytest.mark.parametrize("name", ["modern", "crammed"])
def test_gradients_under_every_policy_are_those_of_the_loss(name: str, remat: Remat) -> None:
    check(*built_and_differentiated(name), remat)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modern", "crammed"])
@pytest.mark.usefixtures("on_an_h100")
def test_gradients_of_a_gpus_kernels_are_those_of_the_loss(name: str) -> None:
    built = build(name)
    check(*built, differentiated(*built), "full")


def kept(remat: Remat) -> list[tuple[int, ...]]:
    """Shapes of what a block's forward pass keeps."""
    objective, params, tokens = build("llama", width=24, mlp=37)
    trace = jax.eval_shape(lambda p, t: walk.forward(objective, p, t, None, 0.3, remat=remat).kept, params, tokens)
    return [array.shape for array in trace]


def test_only_what_depends_on_the_stream_is_kept() -> None:
    shapes = kept("none")
    parameters = {p.shape for p in jax.tree.leaves(build("llama", width=24, mlp=37)[1]["blocks"])}
    assert (2, 24, 37) in shapes  # what the activation gives: kept, to be differentiated
    assert not parameters & set(shapes)
    assert kept("full") == [(2, 2, LENGTH, 24)]  # inputs of the blocks
