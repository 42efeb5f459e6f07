"""Meshes on eight virtual devices: shapes, axis types and refusals."""

import jax
import pytest
from jax.sharding import AxisType

from cramjax.errors import ConfigError
from cramjax.parallel import make_mesh


@pytest.mark.parametrize(
    ("data", "fsdp", "count", "shape"),
    [
        (None, 1, 1, (1, 1)),
        (None, 1, 8, (8, 1)),
        (None, 4, 8, (2, 4)),
        (None, 8, 8, (1, 8)),
        (2, 2, 8, (2, 2)),
        (1, 1, 8, (1, 1)),
        (None, 3, 3, (1, 3)),
    ],
)
def test_mesh_has_both_axes_in_auto_mode(data, fsdp, count, shape):
    mesh = make_mesh(data, fsdp, jax.devices()[:count])
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


def test_mesh_takes_all_devices_by_default():
    assert make_mesh(None, 1).size == len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("data", "fsdp", "words"),
    [
        (None, 3, r"fsdp must divide the 8 devices: one of \[1, 2, 4, 8\], got 3"),
        (None, 16, "got 16"),
        (None, 0, "got 0"),
        (4, 4, r"with fsdp 4, data_parallel must be one of \[1, 2\], got 4"),
        (3, 1, r"one of \[1, 2, 4, 8\], got 3"),
        (0, 1, "got 0"),
        (16, 1, "got 16"),
    ],
)
def test_devices_that_cannot_be_divided_so_are_refused(data, fsdp, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(data, fsdp)
