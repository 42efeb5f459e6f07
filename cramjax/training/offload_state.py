"""What of a run lies where when its optimizer is on the host: shapes, places and bytes, before anything is computed.

`cramjax.training.offload` takes the steps. The host keeps every block by itself, the devices keep them stacked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree

from cramjax.config import RunConfig
from cramjax.model import Loss, Model, width_ratio
from cramjax.optim import Optimizer, make_optimizer
from cramjax.parallel import one_layer, param_shardings, replicated
from cramjax.parallel.offload import host_mesh, over
from cramjax.training.step import State


class HostState(NamedTuple):
    """What the host keeps of a run: `State.optimizer`.

    It keeps each block by itself, so that an update works in place: `{"embed": …, "block_000": …, …, "head": …}`.
    """

    master: dict[str, PyTree]
    """float32 weights."""
    moments: dict[str, PyTree]
    """The optimizer's state."""
    gradient: PyTree
    """The last step's, while it is `pending`; shaped as the parameters. An empty tuple where no update is delayed."""
    norm: Float[Array, ""]
    """Of that gradient."""
    pending: Bool[Array, ""]
    """Whether it has still to be applied."""


class Gradient(NamedTuple):
    """What the device makes of a microbatch."""

    values: PyTree
    """Of the mean loss per predicted token, in pinned host memory, shaped as the parameters."""
    norm: Float[Array, ""]
    loss: Loss


class Sums(NamedTuple):
    """Of the microbatches of a step, where there are several."""

    values: PyTree
    """Gradients times the tokens that each is a mean over, float32."""
    loss: Loss


def device_params(config: RunConfig, model: Model) -> PyTree:
    """Shapes and types of the weights that the device holds."""
    dtype = jnp.dtype(config.train.param_dtype)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), model.abstract_params())


def master_params(model: Model) -> PyTree:
    """Shapes and types of the weights that the host holds, stacked."""
    return replace(model, param_dtype="float32").abstract_params()


def host_bytes(config: RunConfig, parameters: int, copies: int = 1) -> dict[str, int]:
    """Bytes of host memory that training holds at most, by kind, for all devices together.

    Devices along `fsdp` divide them; along `data` each has a CPU device that holds and updates all of them.

    Args:
        config: the run.
        parameters: of its model.
        copies: devices along `data`.

    Returns:
        `weights` in float32, `optimizer` (two moments), `gradients` (and waiting weights), and `sent`: pinned memory.
    """
    crossing = jnp.dtype(config.train.param_dtype).itemsize
    accumulates = (config.batch.microbatch or config.batch.size) < config.batch.size
    gradients = crossing
    if accumulates:  # a float32 sum, while the next gradient is on its way
        gradients += 4 + crossing
    if config.train.delay_update is not None:  # the gradient before, and new weights until the device has finished
        gradients += (4 if accumulates else crossing) + crossing
    each = {"weights": 4, "optimizer": 2 * 4, "gradients": gradients, "sent": crossing}
    return {kind: size * parameters * copies for kind, size in each.items()}


class Layout:
    """Where the state of a run lies when its optimizer is on the host, and how it is divided.

    Args:
        config: the run.
        model: its model.
        mesh: the devices.

    Raises:
        RunError: the devices have no host memory that they can write, or no CPU devices beside them.
    """

    def __init__(self, config: RunConfig, model: Model, mesh: Mesh):
        self.mesh, self.host = mesh, host_mesh(mesh)
        self.layer = {f"block_{layer:03}": layer for layer in range(model.repeats)}
        # As the backward walk makes their gradients.
        self.order = ("head", *reversed(self.layer), "embed")
        stacked = master_params(model)
        self.optimizers: dict[str, Optimizer] = {
            kind: make_optimizer(config.optim, {kind: weights}, width_ratio=width_ratio(config.model))
            for kind, weights in model.weights.items()
        }
        """Of the embedding, of a block, and of the head."""
        self.dtype = jnp.dtype(config.train.param_dtype)
        self.declared = model.weights
        self.shardings = param_shardings(mesh, stacked, model.weights)
        host = over(self.host, self.shardings)
        narrow, wide = device_params(config, model), placed(stacked, host)
        self.sums = Sums(wide, Loss(*[self.on_host(jnp.float32)] * len(Loss._fields)))
        accumulates = (config.batch.microbatch or config.batch.size) < config.batch.size
        self.sent = placed(narrow, host)
        """Shapes and places of a gradient that the device has sent, as `jax.ShapeDtypeStruct`s."""
        self.gradient = wide if accumulates else self.sent
        """Of one that is to be applied."""
        self.weights = self.apart(self.sent, block_like)
        """Of new weights before they go up."""
        master = self.apart(wide, block_like)
        self.state = State(
            step=self.on_devices(jnp.int32),
            params=placed(narrow, self.shardings),
            optimizer=HostState(
                master,
                {name: self._moments(name, tree) for name, tree in master.items()},
                gradient=() if config.train.delay_update is None else self.gradient,
                norm=self.on_host(jnp.float32),
                pending=self.on_host(jnp.bool_),
            ),
            key=self.on_devices(jnp.uint32, 2),
        )
        """Of a whole state."""

    def apart(self, stacked: PyTree, block: Callable[[PyTree, int], PyTree]) -> dict[str, PyTree]:
        """Parts of parameters: the head, each block, and the embedding.

        Args:
            stacked: all of them.
            block: gives one block of the stack, by its layer.
        """
        return {
            name: block(stacked["blocks"], self.layer[name]) if name in self.layer else stacked[name]
            for name in self.order
        }

    def kind(self, name: str) -> str:
        """Which of `optimizers` updates a part."""
        return "blocks" if name in self.layer else name

    def on_devices(self, dtype: Any, *shape: int) -> Any:
        """A small array that every device holds."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def on_host(self, dtype: Any, *shape: int) -> Any:
        """A small array that the CPU device beside every device holds."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.host))

    def _moments(self, name: str, master: PyTree) -> PyTree:
        kind = self.kind(name)
        state = jax.eval_shape(self.optimizers[kind].init, {kind: master})
        if kind != "blocks":
            return placed(state, param_shardings(self.host, state, self.declared))
        # The table knows stacked parameters: as if these were.
        stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(self.layer), *x.shape), x.dtype), state)
        return placed(state, jax.tree.map(one_layer, param_shardings(self.host, stacked, self.declared)))


def block_like(stacked: PyTree, layer: int = 0) -> PyTree:
    """Shapes and places of a block of a stack, which are those of any other."""
    del layer

    def one(x: Any) -> jax.ShapeDtypeStruct:
        sharding = None if x.sharding is None else one_layer(x.sharding)
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    return jax.tree.map(one, stacked)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes, and where such arrays lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def places_of(tree: PyTree) -> PyTree:
    """Shardings of arrays that are not there yet."""
    return jax.tree.map(lambda x: x.sharding, tree)
