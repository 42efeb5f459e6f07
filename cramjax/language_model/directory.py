"""Model directories: `model.yaml`, `tokenizer.json`, `weights-*.safetensors` and index, `origin.json`, chat template.

Weights are under our own names of parameters (`cramjax.kernels.packed.to_arrays`), and written and read one at a time:
nothing is in memory twice. Those with many zeros are stored by the others (`cramjax.formats.sparse`). Each has a
checksum in the index, compared as it is read. No file holds code.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cramjax.data import Tokenizer
from cramjax.errors import ModelError
from cramjax.formats.directory import new_directory
from cramjax.formats.sparse import MASK, VALUES, DenseTensors, sparse_outputs
from cramjax.formats.table import flatten, unflatten
from cramjax.formats.tensors import Output, open_safetensors, shards, write_safetensors
from cramjax.formats.ternary import TernaryTensors, ternary_outputs
from cramjax.formats.tokens import CHAT_TEMPLATE, read_text
from cramjax.kernels.packed import Coded, Settings, adapter_settings, from_arrays, to_arrays
from cramjax.language_model.value import LanguageModel
from cramjax.model import Model, make_model
from cramjax.model_yaml import Description, read_description, write_description
from cramjax.start import start

SHARD_BYTES = 4 << 30
"""Most bytes of a file of weights, unless a single parameter is larger."""
INDEX = "weights.index.json"


def save_model(
    given: LanguageModel,
    out: str | Path,
    *,
    card: str | None = None,
    beside: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model directory, whole or not at all.

    Args:
        given: the model.
        out: the directory to make.
        card: what its README.md says.
        beside: other texts, by the names of their files.
        shard_bytes: most bytes of a file of weights.

    Raises:
        ModelError: the directory exists, or cannot be written.
    """
    with new_directory(out) as path:
        write_description(path, describe(given))
        (path / "tokenizer.json").write_text(given.tokenizer.plain_json(), encoding="utf-8")
        (path / "origin.json").write_text(json.dumps(dict(given.origin), indent=1) + "\n", encoding="utf-8")
        if given.chat_template is not None:
            (path / CHAT_TEMPLATE).write_text(given.chat_template, encoding="utf-8")
        if card is not None:
            (path / "README.md").write_text(card, encoding="utf-8")
        for name, text in (beside or {}).items():
            (path / name).write_text(text, encoding="utf-8")
        index: dict[str, dict[str, Any]] = {"weight_map": {}, "checksums": {}}
        outputs = []
        coded = {name: leaf for name, leaf in flatten(given.params) if isinstance(leaf, Coded)}
        for name, leaf in coded.items():
            outputs += ternary_outputs(name, leaf)
            index.setdefault("coded", {})[name] = {"inner": leaf.inner, "words": leaf.words.shape[-1]}
        for name, leaf in to_arrays(given.params).items():
            if name.rpartition(".")[0] in coded:
                continue
            parts = sparse_outputs(name, leaf)
            outputs += [_output(name, leaf)] if parts is None else parts
            if parts is not None:
                index.setdefault("sparse", {})[name] = list(leaf.shape)
        groups = shards(outputs, shard_bytes)
        if adapters := adapter_settings(given.params):
            index["adapters"] = adapters
        for number, group in enumerate(groups, start=1):
            name = f"weights-{number:05}-of-{len(groups):05}.safetensors"
            index["checksums"] |= write_safetensors(path / name, group)
            index["weight_map"] |= {output.name: name for output in group}
        (path / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return Path(out).expanduser()


def load_model(
    path: str | Path, shardings: PyTree | None = None, *, put: Callable[[str, np.ndarray], Any] | None = None
) -> LanguageModel:
    """Read a model directory; each weight goes to its devices as soon as it is read.

    Args:
        path: the directory.
        shardings: of the parameters, as a tree like theirs. Default: all on the default device.
        put: places an array that has been read, given its name; what it gives stands among the parameters.

    Raises:
        UserError: it is not a model directory, or a file of it is missing, damaged or not what its name says.
    """
    stored = open_model(path)
    read = put or _placer(shardings)
    tensors = stored.tensors
    params = from_arrays({name: read(name, tensors.read(name)) for name in tensors.names}, stored.adapters)
    return replace(stored.model, params=unflatten(dict(flatten(params)), stored.model.params))


@dataclass(frozen=True)
class StoredModel:
    """A model directory of which no weight has been read."""

    model: LanguageModel
    """The model, with shapes for its parameters, as they are stored."""
    tensors: TernaryTensors
    """Their arrays, by the names of `to_arrays`."""
    adapters: Settings
    """Settings of adapters among them."""

    @property
    def dense(self) -> DenseTensors:
        """The arrays that can be read a part at a time: all, where none is stored by an entropy code."""
        return self.tensors.files


def open_model(path: str | Path) -> StoredModel:
    """Open a model directory: its files are judged, and no weight is read yet.

    Args:
        path: the directory.

    Raises:
        UserError: it is not a model directory, or a file of it is missing, damaged or not what its name says.
    """
    path = Path(path).expanduser()
    description = read_description(path)
    start()
    tokenizer = read_tokenizer(path, description)
    model = model_of(description, description.separator_id)
    tensors, adapters = _open_weights(path)
    opened = LanguageModel(
        path=path,
        kind=description.kind,
        tokenizer=tokenizer,
        context=description.context,
        model=model,
        params=_stored_params(path, model, tensors, adapters),
        normalize=description.normalize,
        mask_rate=description.mask_rate,
        chat_template=read_text(path / CHAT_TEMPLATE),
        embedding=description.embedding,
        origin=read_origin(path),
    )
    return StoredModel(opened, tensors, adapters)


def read_tokenizer(path: Path, description: Description) -> Tokenizer:
    """The vocabulary of a model directory.

    Raises:
        UserError: it is missing or damaged, or another model's.
    """
    tokenizer = Tokenizer.load(
        path / "tokenizer.json",
        separator_id=description.separator_id,
        mask_id=description.mask_id,
        pad_id=description.pad_id,
        begin_ids=description.begin_ids,
        end_ids=description.end_ids,
    )
    if tokenizer.vocab_size > description.vocab_size:
        raise ModelError(
            f"{path / 'tokenizer.json'} has {tokenizer.vocab_size:,} tokens, and the model {description.vocab_size:,} "
            "rows: it is another model's tokenizer."
        )
    return tokenizer


def describe(given: LanguageModel) -> Description:
    """What `model.yaml` says of a model."""
    return Description(
        architecture=given.config,
        vocab_size=given.model.vocab_size,
        context=given.context,
        kind=given.kind,
        normalize=given.normalize,  # pyright: ignore[reportArgumentType]
        mask_rate=given.mask_rate,
        param_dtype=given.model.param_dtype,  # pyright: ignore[reportArgumentType]
        compute_dtype=given.model.compute_dtype,  # pyright: ignore[reportArgumentType]
        separator_id=given.tokenizer.separator_id,
        mask_id=given.tokenizer.mask_id,
        pad_id=given.tokenizer.pad_id,
        begin_ids=given.tokenizer.begin_ids,
        end_ids=given.tokenizer.end_ids,
        embedding=given.embedding,
    )


def model_of(description: Description, separator_id: int) -> Model:
    """The functions of a described model."""
    return make_model(
        description.architecture,
        vocab_size=description.vocab_size,
        sequence_length=description.context,
        causal=description.kind in ("causal", "causal_labels"),
        separator_id=separator_id,
        compute_dtype=description.compute_dtype,
        param_dtype=description.param_dtype,
    )


def _output(path: str, leaf: Any) -> Output:
    def pieces() -> Any:
        if not path.startswith("blocks/"):
            return [np.asarray(leaf)]
        # A layer at a time: on a GPU, a stack need not fit the host's memory at once.
        return (np.asarray(leaf[index]) for index in range(len(leaf)))

    return Output(path, leaf.shape, np.dtype(leaf.dtype), pieces)


def _placer(shardings: PyTree | None) -> Callable[[str, np.ndarray], Any]:
    if shardings is None:
        return lambda _, array: jax.device_put(array, start()[0], may_alias=True)
    where = to_arrays(shardings)
    return lambda name, array: jax.device_put(array, where[name], may_alias=True)


def _stored_params(path: Path, model: Model, tensors: TernaryTensors, adapters: Settings) -> PyTree:
    """Shapes of the parameters as they are stored, which are those that the model has."""
    abstract = model.abstract_params()
    shapes = {name: jax.ShapeDtypeStruct(tensors.shape(name), tensors.dtype(name)) for name in tensors.names}
    try:
        found = dict(flatten(from_arrays(shapes, adapters)))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    wanted = dict(flatten(abstract))
    for name, leaf in wanted.items():
        if name not in found:
            raise ModelError(f"{path} has no weights for {name}: copy the model again, or make it again.")
        if found[name].shape != leaf.shape:
            file = tensors.file(next(iter(to_arrays({name: found[name]}))))
            raise ModelError(f"{file}: {name} must have shape {leaf.shape}, got {found[name].shape}.")
    if left := [name for name in found if name not in wanted]:
        raise ModelError(f"{path} has weights that model.yaml has no place for: {', '.join(left[:5])}.")
    return unflatten(found, abstract)


def _open_weights(path: Path) -> tuple[TernaryTensors, Settings]:
    """The weights' files, and the settings of adapters among them."""
    index = _read_json(path / INDEX)
    try:
        adapters = {name: dict(values) for name, values in index.get("adapters", {}).items()}
        files = sorted(set(index["weight_map"].values()))
        checksums = {name: int(value) for name, value in index["checksums"].items()}
        opened = open_safetensors([path / Path(file).name for file in files], checksums)
        sparse = {name: [int(size) for size in shape] for name, shape in index.get("sparse", {}).items()}
        if gone := [part for name in sparse for part in (name + MASK, name + VALUES) if part not in opened.places]:
            raise ModelError(f"{path} has no weights for {gone[0]}: copy the model again, or make it again.")
        coded = {name: {key: int(n) for key, n in own.items()} for name, own in index.get("coded", {}).items()}
        return TernaryTensors(DenseTensors(opened, sparse), coded), adapters
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ModelError(f"{path / INDEX} is damaged: copy the model again, or make it again.") from None


def read_origin(path: Path) -> dict[str, Any]:
    """Where a model directory's model came from; see `LanguageModel.origin`.

    Raises:
        ModelError: what says so is damaged.
    """
    file = path / "origin.json"
    origin = _read_json(file) if file.is_file() else {}
    if not isinstance(origin, dict):
        raise ModelError(f"{file} must hold a JSON object, got a {type(origin).__name__}: copy the model again.")
    return origin


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist: copy the model again, or make it again.") from None
    except ValueError:
        raise ModelError(f"{file} is damaged (it is not JSON): copy the model again, or make it again.") from None
