"""Arrays with many zeros in files: bit for bit what they were, in the fewer bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ModelError
from cramjax.formats.sparse import DenseTensors, sparse_outputs, stored_bytes
from cramjax.formats.tensors import open_safetensors, write_safetensors
from cramjax.language_model import LanguageModel, load_model, save_model


def stack(dtype: Any, share: float, shape: tuple[int, ...] = (3, 7, 5)) -> np.ndarray:
    rng = np.random.default_rng(0)
    array = np.where(rng.random(shape) < share, 0, rng.normal(size=shape)).astype(dtype)
    array[0, 0, :2] = -0.0
    return array


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_written_is_read(dtype: Any, share: float, tmp_path: Path) -> None:
    array = stack(dtype, share)
    outputs = sparse_outputs("w", array)
    assert outputs is not None
    count = np.count_nonzero(array.view(f"u{array.itemsize}"))  # -0.0 is one of them
    assert sum(output.bytes for output in outputs) == stored_bytes(array) == 3 * 5 + array.itemsize * count
    sums = write_safetensors(tmp_path / "w.safetensors", outputs)
    tensors = DenseTensors(open_safetensors([tmp_path / "w.safetensors"], sums), {"w": array.shape})
    assert list(tensors.names) == ["w"] and tensors.dtype("w") == array.dtype and tensors.shape("w") == array.shape
    assert tensors.read("w").tobytes() == array.tobytes()
    with pytest.raises(ModelError, match=r"w\.safetensors: the bits and the numbers of w do not fit"):
        replace(tensors, sparse={"w": (3, 7, 6)}).read("w")


@pytest.mark.parametrize("array", [stack("float32", 0.05), stack("float32", 0.9)[0], np.zeros((2, 8, 8), np.int8)])
def test_others_are_stored_as_they_are(array: np.ndarray) -> None:
    assert sparse_outputs("w", array) is None and stored_bytes(array) == array.nbytes


def test_a_model_with_zeros_is_a_smaller_directory(model_of: Callable[..., LanguageModel], tmp_path: Path) -> None:
    model = model_of()
    up = model.params["blocks"]["mlp"]["up"]
    whole = save_model(model, tmp_path / "whole")
    up["kernel"] = jnp.where(up["kernel"] < 0, 0, up["kernel"])
    path = save_model(model, tmp_path / "model")
    back = load_model(path)
    for got, wanted in zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    before, after = (sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (whole, path))
    saved = up["kernel"].nbytes - stored_bytes(np.asarray(up["kernel"]))
    assert saved > 0.4 * up["kernel"].nbytes and after == pytest.approx(before - saved, abs=256)
