"""ZeRO's stages on eight virtual devices: what each device holds, and that sharing it changes no number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, ObjectiveConfig, OptimConfig
from cramjax.kernels.cross_entropy import cross_entropy_sum
from cramjax.kernels.lookup import lookup
from cramjax.model import make_model, objective_for
from cramjax.optim import make_optimizer
from cramjax.parallel import batch_sharding, bytes_per_device, make_mesh, on_mesh, zero_shardings
from cramjax.training.step import Batch, State, initial_state, make_step, state_shardings

MODEL = ModelConfig(layers=3, width=32, heads=4, mlp=64, value_embeddings=True, embedding_skip=True, dropout=0.1)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 8, 17)).astype(np.int32)


def _parts(kind: str = "causal") -> tuple[Any, Any, Any]:
    causal = kind == "causal"
    model = make_model(MODEL, vocab_size=64, sequence_length=16, causal=causal, separator_id=0, layer_loop="scan")
    optimizer = make_optimizer(OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1), model.weights)
    objective = objective_for(ObjectiveConfig(kind=kind), model, mask_id=1)  # pyright: ignore[reportArgumentType]
    return model, optimizer, objective


def _compiled(kind: str, data: int, fsdp: int, zero: int) -> tuple[Any, State, Batch]:
    """The step on a mesh of that many devices, a state, and a batch of two microbatches."""
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    model, optimizer, objective = _parts(kind)

    def create() -> State:
        return initial_state(model.init(jax.random.key(0)), optimizer, 0)

    abstract = jax.eval_shape(create)
    shardings = state_shardings(mesh, abstract, model.weights, zero)
    state = jax.device_put(jax.jit(create)(), shardings)
    shared = None if mesh.size == 1 else zero_shardings(mesh, abstract.params, model.weights, zero)
    rows = jax.NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))
    tokens = jax.device_put(TOKENS if kind == "causal" else TOKENS[..., :16], rows)
    step = jax.jit(
        on_mesh(mesh, make_step(objective, optimizer, shared)), donate_argnums=0, out_shardings=(shardings, None)
    )
    batch = Batch(tokens, np.int32(2))  # pyright: ignore[reportArgumentType]
    return step.lower(state, batch, np.float32(0.5)).compile(), state, batch


def _train(kind: str, data: int, fsdp: int, zero: int, steps: int = 3) -> tuple[list[float], Any]:
    step, state, batch = _compiled(kind, data, fsdp, zero)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, np.float32(0.5))
        losses.append(float(metrics.loss))
    return losses, jax.tree.map(np.asarray, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_every_stage_trains_as_one_device_does(kind: str) -> None:
    losses, params = _train(kind, 1, 1, 3)
    assert losses[-1] < losses[0]
    for data, fsdp, zero in ((1, 8, 1), (1, 8, 2), (1, 8, 3), (2, 4, 1), (2, 4, 2), (2, 4, 3)):
        others, same = _train(kind, data, fsdp, zero)
        # Float32 sums in another order, through Adam's division by values near 0: steps of 1e-2 differ by 1%.
        np.testing.assert_allclose(others, losses, rtol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same, params)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_device_holds_its_share(zero: int) -> None:
    model, optimizer, _ = _parts()
    state = jax.eval_shape(lambda: initial_state(model.init(jax.random.key(0)), optimizer, 0))

    def held(devices: int) -> tuple[int, int, int]:
        mesh = make_mesh(1, devices, jax.devices()[:devices])
        stage = zero_shardings(mesh, state.params, model.weights, zero)
        place = lambda tree, shardings: jax.tree.map(  # noqa: E731
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )
        whole = place(state, state_shardings(mesh, state, model.weights, zero))
        return tuple(map(bytes_per_device, (whole.params, place(state.params, stage.gradients), whole.optimizer)))

    shares = [one / many for one, many in zip(held(1), held(8), strict=True)]
    # All but norms and scalars, 4% of this small model, is shared among eight.
    assert [share > 6 for share in shares] == [zero >= 3, zero >= 2, True]
    assert [share == 1 for share in shares] == [zero < 3, zero < 2, False]


@pytest.mark.slow
def test_loops_carry_shares_of_what_a_stage_shares() -> None:
    def carried(zero: int) -> int:
        """Whole arrays as large as mlp.up of all layers, in what loops carry: weights and gradients."""
        text = _compiled("causal", 1, 8, zero)[0].as_text()
        return sum(line.count("f32[3,32,64]") for line in text.splitlines() if " while(" in line)

    first, second, third = map(carried, (1, 2, 3))
    assert first > second > third == 0


def test_lookups_and_losses_are_those_of_one_device() -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(2, 24, 16)).astype(np.float32)
    rows = jnp.asarray(rng.integers(0, 30, (16, 5)))  # numbers past the end read the last row
    targets = jnp.asarray(rng.integers(0, 24, 80))

    def loss(table: Any) -> Any:
        x = jnp.sin(lookup(table, rows)).sum(0).reshape(-1, 16)
        return cross_entropy_sum(x, table[0].T, targets, tied=True).total

    one = jax.value_and_grad(loss)(table)
    for mesh in (make_mesh(1, 8), make_mesh(2, 4)):
        placed = jax.device_put(table, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
        many = jax.jit(on_mesh(mesh, jax.value_and_grad(loss)))(placed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), many, one)
