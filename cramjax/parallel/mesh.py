"""The device mesh: axes `data` and `fsdp`, of size 1 where they are not used, so that one code path serves any number.

Sequences of a batch are shared out over both axes; parameters and optimizer state over `fsdp` alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from cramjax.axes import MESH_AXES
from cramjax.errors import ConfigError
from cramjax.start import start


def make_mesh(data: int | None, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first data × fsdp devices.

    Args:
        data: Devices that hold different sequences and the same parameters. Default: all that `fsdp` leaves.
        fsdp: Devices that share the parameters as well.
        devices: Devices to use. Default: all there are.

    Returns:
        A mesh whose axis types are all Auto: the compiler propagates shardings.

    Raises:
        ConfigError: The devices cannot be divided so.
    """
    devices = list(start() if devices is None else devices)
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        raise ConfigError(f"train.fsdp must divide the {count} devices: one of {_divisors(count)}, got {fsdp}")
    if data is None:
        data = count // fsdp
    if data < 1 or (count // fsdp) % data:
        raise ConfigError(
            f"train.data_parallel × train.fsdp must divide the {count} devices: with fsdp {fsdp}, data_parallel must "
            f"be one of {_divisors(count // fsdp)}, got {data}"
        )
    return jax.make_mesh((data, fsdp), MESH_AXES, (AxisType.Auto,) * 2, devices=devices[: data * fsdp])


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced for a mesh: kernels ask the context which mesh they are on (`cramjax.kernels.mesh`).

    Args:
        mesh: as `make_mesh` makes it. One device needs no context, and gets none.
        function: anything that is to be compiled.
    """
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def traced(*arguments: Any, **keywords: Any) -> Any:
        # Ahead of time, the context knows better which device it stands for.
        device = jax.sharding.get_abstract_mesh().abstract_device or mesh.abstract_mesh.abstract_device
        context = AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device)
        with jax.sharding.use_abstract_mesh(context):
            return function(*arguments, **keywords)

    return traced


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
