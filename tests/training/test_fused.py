"""LOMO and AdaLomo fused with the walk equal optax's updates of full gradients, alone and on many devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cramjax.config import ObjectiveConfig, OptimConfig, Remat
from cramjax.model import Objective, make_model, objective_for
from cramjax.optim import FusedOptimizer, make_fused, schedule
from cramjax.optim.groups import path_name, peak_rate, weight_decay
from cramjax.parallel import batch_sharding, make_mesh, on_mesh, param_shardings, zero_shardings
from cramjax.training.fused import make_fused_step
from cramjax.training.step import Batch, State, initial_state

from ..model.small import CONFIGS, LENGTH, SEPARATOR, VOCAB, trained_like

_STEPS = 20
_RATES = {"embed_lr": 0.03, "scalar_lr": 0.01, "weight_decay": 0.1, "warmup": 0.2, "decay": 0.5}
_LOMO = OptimConfig(name="lomo", lr=0.05, clip=None, **(_RATES | {"scalar_lr": 0.1}))
_CLIPPED = dataclasses.replace(_LOMO, clip=0.5)
_ADALOMO = OptimConfig(name="adalomo", lr=0.05, clip=1.0, **_RATES)
_OPTIMIZERS = {"lomo": _LOMO, "lomo-clipped": _CLIPPED, "adalomo": _ADALOMO}


def build(*, tied: bool, batch: int = 4, **changes: Any) -> tuple[Objective, list[Batch]]:
    """A small model with every kind of parameter, and twenty batches."""
    config = dataclasses.replace(CONFIGS["modern"], tied=tied, **({"dropout": 0.1} | changes))
    model = make_model(
        config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True, separator_id=SEPARATOR, layer_loop="scan"
    )
    tokens = np.random.default_rng(1).integers(0, VOCAB, (_STEPS, 1, batch, LENGTH + 1))
    return objective_for(ObjectiveConfig(), model), [Batch(jnp.asarray(t, jnp.int32), jnp.int32(1)) for t in tokens]


def unfused(objective: Objective, config: OptimConfig, params: Any) -> Callable[..., tuple[Any, Any]]:
    """The same step from full gradients, by optax, and its state."""
    transform = optax.identity()
    if config.name == "adalomo":
        each = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=1),
            optax.clip_by_block_rms(config.clip),
            optax.scale_by_param_block_rms(1e-3),
        )
        stacked = optax.GradientTransformation(jax.vmap(each.init), jax.vmap(each.update))
        # Each layer's tensor, and each layer's table of value embeddings, by itself.
        kinds = {"blocks": stacked, "values": stacked, "single": each}

        def kind(path: str) -> str:
            return "blocks" if path.startswith("blocks/") else "values" if path == "embed/value/table" else "single"

        transform = optax.partition(
            kinds, jax.tree_util.tree_map_with_path(lambda path, _: kind(path_name(path)), params)
        )
    elif config.clip is not None:
        transform = optax.clip_by_global_norm(config.clip)
    rates = jax.tree.map(lambda weight: peak_rate(config, weight.role), objective.model.weights)
    decays = jax.tree.map(lambda weight: weight_decay(config, weight.role), objective.model.weights)

    def step(params: Any, state: Any, number: Any, batch: Batch, fraction: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), 0)

        def mean_loss(params: Any) -> jax.Array:
            loss = objective(params, batch.tokens[0], key, fraction, True)
            return loss.total / loss.tokens

        updates, state = transform.update(jax.grad(mean_loss)(params), state, params)
        multiplier = schedule(config)(fraction)
        return (
            jax.tree.map(lambda p, u, r, d: p - multiplier * r * (u + d * p), params, updates, rates, decays),
            state,
        )

    return jax.jit(step), transform.init(params)


def fused(objective: Objective, config: OptimConfig, remat: Remat = "none") -> tuple[FusedOptimizer, Any]:
    optimizer = make_fused(config, objective.model.weights)
    return optimizer, jax.jit(make_fused_step(objective, optimizer, remat=remat))


def check(config: OptimConfig, remat: Remat, *, tied: bool) -> None:
    objective, batches = build(tied=tied)
    initial = trained_like(objective.model)
    optimizer, step = fused(objective, config, remat)
    state = initial_state(initial, optimizer, 0)
    plain, plain_state = unfused(objective, config, initial)
    expected = initial
    for number, batch in enumerate(batches):
        fraction = jnp.float32((number + 1) / _STEPS)
        state, metrics = step(state, batch, fraction)
        expected, plain_state = plain(expected, plain_state, jnp.int32(number), batch, fraction)
    assert np.isfinite(metrics.grad_norm)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state.params), strict=True
    ):
        # The walk adds gradients up in another order than JAX's own derivative of the whole loss.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * max(1.0, float(jnp.abs(want).max())), err_msg=path)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), initial, expected)
    assert min(jax.tree.leaves(moved)) > 1e-4  # a hundred times the tolerance


@pytest.mark.slow
def test_adalomo_equals_the_unfused_composition() -> None:
    check(_ADALOMO, "full", tied=False)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_updates_equal_the_unfused_composition(name: str, remat: Remat, tied: bool) -> None:
    check(_OPTIMIZERS[name], remat, tied=tied)


@pytest.mark.slow
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_many_devices_compute_the_same(name: str) -> None:
    objective, batches = build(tied=False, batch=8)
    optimizer, step = fused(objective, _OPTIMIZERS[name])
    alone = initial_state(objective.model.init(jax.random.key(5)), optimizer, 0)
    mesh = make_mesh(2, 4)
    shardings = param_shardings(mesh, jax.eval_shape(lambda: alone), objective.model.weights)
    shared: State = jax.device_put(jax.tree.map(jnp.copy, alone), shardings)
    sharding = zero_shardings(mesh, alone.params, objective.model.weights, 3)
    pure = on_mesh(mesh, make_fused_step(objective, optimizer, remat="none", sharding=sharding))
    parallel = jax.jit(pure, donate_argnums=0, out_shardings=(shardings, None))
    rows = jax.NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))
    for number, batch in enumerate(batches[:5]):
        fraction = jnp.float32((number + 1) / _STEPS)
        alone, metrics = step(alone, batch, fraction)
        shared, many = parallel(shared, Batch(jax.device_put(batch.tokens, rows), batch.count), fraction)
        np.testing.assert_allclose(many, metrics, rtol=1e-5)
    assert shared.params["blocks"]["mlp"]["up"]["kernel"].sharding.spec == jax.P(None, None, "fsdp")
    for want, got in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # sums over devices, in another order


@pytest.mark.slow
def test_learned_in_bfloat16_with_state_in_its_place() -> None:
    """Parameters of low precision learn; nothing of theirs is float32."""
    objective, batches = build(tied=False, dropout=0.0)
    model = dataclasses.replace(objective.model, param_dtype="bfloat16")
    objective = dataclasses.replace(objective, model=model)
    config = OptimConfig(name="adalomo", lr=0.02, schedule="constant", clip=1.0)
    optimizer, step = fused(objective, config, "full")
    state = initial_state(model.init(jax.random.key(5)), optimizer, 0)
    losses = []
    for _ in range(4):
        for batch in batches[:4]:  # the same again, to be learned by heart
            state, metrics = step(state, batch, jnp.float32(0.5))
            losses.append(float(metrics.loss))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
