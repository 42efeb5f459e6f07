"""The pure training step: state, batch and spent fraction in; new state and metrics out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from cramjax.compiling import device_options
from cramjax.model.objectives import Loss
from cramjax.optim import FusedOptimizer, Optimizer
from cramjax.parallel import StateSharding, param_shardings, zero_shardings
from cramjax.training.frozen import merged, split

LossFunction = Callable[..., Loss]


class State(NamedTuple):
    """Everything a step changes: one pytree, one checkpoint."""

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    key: Any
    """Raw key data of the run's random stream; step N folds N into it, so a resumed run draws the same numbers."""
    frozen: PyTree = ()
    """Parameters that are not trained (`cramjax.training.frozen`); an empty tuple if all are."""


class Batch(NamedTuple):
    """Sequences of one optimizer step, cut into microbatches of a fixed size."""

    tokens: Int[Array, "microbatches microbatch *row"]
    """Rows as the objective takes them; see `cramjax.config.ObjectiveConfig.row_shape`."""
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many of the microbatches hold data. It is traced: a growing batch compiles once."""


class StepMetrics(NamedTuple):
    """Scalars of one step, read by the loop one step late."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    finite: Any


class DeviceProgram(NamedTuple):
    """What devices run, ready to be traced."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Their shapes and places."""
    out_shardings: Any
    """Places of what it returns."""
    donate: tuple[int, ...] = ()
    """Arguments whose memory the results may take."""

    def lower(self, budget: str) -> Any:
        """Trace it: a `jax.stages.Lowered`, to be compiled as suits its devices and the budget of its run."""
        device = next(iter(jax.tree.leaves(self.arguments)[0].sharding.device_set))
        placed = {"donate_argnums": self.donate, "out_shardings": self.out_shardings}
        return jax.jit(self.function, compiler_options=device_options(device, budget), **placed).lower(*self.arguments)


def initial_state(
    params: PyTree, optimizer: Optimizer | FusedOptimizer, seed: int, freeze: Sequence[str] = ()
) -> State:
    """The state before the first step.

    Args:
        params: all parameters of the model.
        optimizer: for those that are trained.
        seed: of the run.
        freeze: patterns of what is not trained, as of `cramjax.training.frozen.split`.
    """
    key = jax.random.key_data(jax.random.key(seed))
    trained, frozen = split(params, freeze)
    return State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), key, frozen)


def evaluation_params(state: State, optimizer: Optimizer | FusedOptimizer) -> PyTree:
    """All parameters of the model, to evaluate with: averaged where the optimizer keeps an average."""
    return merged(optimizer.evaluation_params(state.params, state.optimizer), state.frozen)


def state_shardings(mesh: Mesh, state: State, weights: PyTree, zero: int) -> State:
    """Where a state lies between steps.

    Args:
        mesh: the devices.
        state: arrays or `ShapeDtypeStruct`s.
        weights: declarations of the parameters.
        zero: what the `fsdp` axis shares, as of `cramjax.parallel.zero_shardings`.
    """
    params, frozen = (zero_shardings(mesh, tree, weights, zero).params for tree in (state.params, state.frozen))
    return param_shardings(mesh, state, weights)._replace(params=params, frozen=frozen)


def make_step(
    loss_function: LossFunction, optimizer: Optimizer, sharding: StateSharding | None = None
) -> Callable[..., tuple[State, StepMetrics]]:
    """The step `(state, batch, fraction) -> (state, metrics)` of an objective and an optimizer.

    The gradient is that of the mean loss per predicted token over all microbatches that hold data. `fraction` is the
    traced share of the budget spent once this step has ended.

    Args:
        loss_function: `(params, tokens, key, fraction, train) -> Loss`, sums over a microbatch.
        optimizer: turns gradients into new parameters.
        sharding: how devices share gradients and the update; None on one device.
    """

    def share(tree: PyTree, name: str) -> PyTree:
        return tree if sharding is None else jax.lax.with_sharding_constraint(tree, getattr(sharding, name))

    def sums(params: PyTree, frozen: PyTree, tokens: Array, key: Array, fraction: Array) -> tuple[Array, Loss]:
        loss = loss_function(merged(params, frozen), tokens, key, fraction, True)
        return loss.total, loss

    value_and_grad = jax.value_and_grad(sums, has_aux=True)

    def step(state: State, batch: Batch, fraction: Float[Array, ""]) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def microbatch(index: Any) -> tuple[Loss, PyTree]:
            (_, loss), grads = value_and_grad(
                state.params, state.frozen, batch.tokens[index], jax.random.fold_in(key, index), fraction
            )
            return loss, share(grads, "gradients")

        if batch.tokens.shape[0] == 1:
            total = microbatch(0)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(microbatch, 0))
            total = jax.lax.fori_loop(
                0, batch.count, lambda i, carry: jax.tree.map(jnp.add, carry, microbatch(i)), zeros
            )
        loss, grads = total
        grads = jax.tree.map(lambda g: g / loss.tokens.astype(g.dtype), grads)

        def objective(params: PyTree) -> Array:  # for optimizers that look at curvature; others leave it unused
            total, loss = sums(params, state.frozen, batch.tokens[0], jax.random.fold_in(key, 0), fraction)
            return total / loss.tokens

        with jax.named_scope("optimizer"):
            params, optimizer_state, measured = optimizer.update(
                share(grads, "update"), state.optimizer, share(state.params, "update"), fraction, objective=objective
            )
            # Each device has updated its share, and only then are parameters that all of them hold put together.
            params = share(share(params, "update"), "params")
        mean_loss = loss.nll / loss.tokens
        metrics = StepMetrics(
            loss=mean_loss,
            accuracy=loss.correct / loss.tokens,
            grad_norm=measured["grad_norm"],
            lr=measured["lr"],
            finite=jnp.isfinite(mean_loss) & jnp.isfinite(measured["grad_norm"]),
        )
        return State(state.step + 1, params, optimizer_state, state.key, state.frozen), metrics

    return step
