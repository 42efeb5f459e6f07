"""Model directories whose matrices are packed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.errors import ModelError
from cramjax.formats.tensors import Output, write_safetensors
from cramjax.kernels.packed import is_packed, pack, unpacked
from cramjax.language_model import LanguageModel, load_model, save_model
from cramjax.serve import generate

MakeModel = Callable[..., LanguageModel]


def packed_model(model_of: MakeModel, bits: int, **options: Any) -> LanguageModel:
    model = model_of(tied=False)
    return replace(model, params=pack(model.params, model.model.weights, f"int{bits}", 16, head=True, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {"symmetric": False, "scale_dtype": "bfloat16"})])
def test_a_packed_model_is_a_directory(model_of: MakeModel, tmp_path: Path, bits: int, options: Any) -> None:
    model = packed_model(model_of, bits, **options)
    save_model(model, tmp_path / "model", shard_bytes=4096)
    assert len(list((tmp_path / "model").glob("weights-*"))) > 3  # parts may lie in several files
    back = load_model(tmp_path / "model")
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    for got, wanted in zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    # It continues text as the model does whose weights are those that it stands for.
    arrays = replace(model, params=jax.tree.map(unpacked, model.params, is_leaf=is_packed))
    prompts, options = ["the stack", "every"], {"max_tokens": 12, "temperature": 0.0}
    texts = [[each.text for each in generate(m, prompts, **options)] for m in (back, arrays)]
    assert texts[0] == texts[1] and all(texts[0])


def test_packed_models_are_not_exported(model_of: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has packed weights: export its codes"):
        packed_model(model_of, 8).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("q", np.zeros((2, 32, 48), np.int8), "these shapes do not fit one another"),
        ("scale", None, r"blocks/mlp/up/kernel\.q \(int8\): a quantised matrix has"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    model_of: MakeModel, tmp_path: Path, part: str, array: np.ndarray | None, message: str
) -> None:
    path, name = (
        save_model(packed_model(model_of, 8), tmp_path / "model", shard_bytes=1),
        f"blocks/mlp/up/kernel.{part}",
    )
    index = json.loads((path / "weights.index.json").read_text(encoding="utf-8"))
    if array is None:
        del index["weight_map"][name]
    else:
        output = Output(name, array.shape, array.dtype, lambda: [array])
        index["checksums"] |= write_safetensors(path / index["weight_map"][name], [output])
    (path / "weights.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        load_model(path)
