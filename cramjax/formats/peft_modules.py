"""The linear layers of another library's class, by name, as the places that adapters of it are for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import PyTree

from cramjax.data import Tokenizer
from cramjax.errors import ModelError
from cramjax.formats.export import Exported, plain_class
from cramjax.formats.family import Kind
from cramjax.formats.table import Piece, flatten, pieces_of
from cramjax.formats.tensors import SafetensorsFiles, require_weights
from cramjax.model import Model

ROOT = "base_model.model."
"""What names of tensors start with."""

_ENDINGS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "ia3_l", "base_layer.weight")
"""And what they end in, after a module's name."""


class Base(Protocol):
    """What of a `LanguageModel` is read here."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def model(self) -> Model: ...  # noqa: D102
    @property
    def params(self) -> PyTree: ...  # noqa: D102
    @property
    def tokenizer(self) -> Tokenizer: ...  # noqa: D102
    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def origin(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Module:
    """A linear layer of theirs, and where its matrix stands in one of ours."""

    name: str
    """Its path in their model."""
    generic: str
    """The same with `{}` in the place of the layer's number."""
    piece: Piece
    place: int
    """Among the matrices that are side by side in ours."""

    def layer(self, array: Any) -> Any:
        """What of a stacked array belongs to its layer."""
        return array if self.piece.index is None else array[self.piece.index]


class Modules:
    """The linear layers of the class that computes a model."""

    def __init__(self, given: Base) -> None:
        family = given.origin.get("family")
        fit = plain_class(Exported(given.model, {}, given.tokenizer, given.kind, given.context, None, family))
        table, self._prefix = fit.family.table(fit.hf_config), fit.family.prefix
        self.head_dim = given.model.sizes.head_dim
        # A class without a head is the part of the others that has a name there.
        bare = self._prefix if given.kind == "encoder" else ""
        self.by_path: dict[str, list[Module]] = {}
        for path, weight in flatten(given.model.weights):
            if weight.role in ("matrix", "head"):
                self.by_path[path] = list(self._of(pieces_of(path, weight, table, given.model), bare))
        self.all = [module for own in self.by_path.values() for module in own]

    @staticmethod
    def _of(pieces: Sequence[Piece], bare: str) -> Iterator[Module]:
        for piece in pieces:
            generic = piece.part.name.removesuffix(".weight").removeprefix(bare)
            beside = [other.columns.start for other in pieces if other.index == piece.index]
            place = sorted(beside).index(piece.columns.start)
            yield Module(generic.format(*piece.numbers), generic, piece, place)

    def found(self, tensors: SafetensorsFiles) -> dict[str, dict[str, str]]:
        """Tensors of each module, by the last steps of their names.

        Raises:
            ModelError: some are of no module.
        """
        names = {module.name for module in self.all}
        found: dict[str, dict[str, str]] = {}
        strangers = []
        for name in tensors.names:
            module, ending = _cut(name.removeprefix(ROOT))
            # Those of an encoder alone lack what those of the whole model start with.
            called = (module, f"{self._prefix}{module}", module.removeprefix(self._prefix))
            module = next((each for each in called if each in names), None)
            if ending is None or module is None or not name.startswith(ROOT):
                strangers.append(name)
            else:
                found.setdefault(module, {})[ending] = name
        if strangers:
            embedding = any(".lora_embedding_" in name for name in strangers)
            why = "adapters of embeddings are not here" if embedding else "the model has no such linear layer"
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            raise ModelError(f"the adapter has the tensors {', '.join(strangers[:3])}{more}: {why}.")
        return found

    def entries(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What stands for modules in a configuration: the end of a name where all that have it are chosen with the same
        value, and else whole names.

        Args:
            chosen: a value for each module.
        """
        generics: dict[str, list[str]] = {}
        for module in self.all:
            generics.setdefault(module.generic, []).append(module.name)
        entries = {}
        for generic, names in generics.items():
            steps = generic.rpartition("{}.")[2].split(".")
            ends = [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]
            having = {end: [g for g in generics if g == end or g.endswith(f".{end}")] for end in ends}
            # The shortest that no others have; else the longest, if the others are chosen too.
            end = next((end for end in ends if having[end] == [generic]), ends[-1])
            values = {chosen.get(name) for other in having[end] for name in generics[other]}
            if len(values) == 1 and None not in values:
                entries[end] = values.pop()
            else:
                entries |= {name: chosen[name] for name in names if name in chosen}
        return entries


def _cut(name: str) -> tuple[str, str | None]:
    """A tensor's module, and what it is of that."""
    ending = next((ending for ending in _ENDINGS if name.endswith(f".{ending}")), None)
    return (name, None) if ending is None else (name.removesuffix(f".{ending}"), ending)


def read_part(tensors: SafetensorsFiles, name: str, shape: tuple[int, ...], module: Module) -> np.ndarray:
    """A tensor of an adapter, in float32.

    Args:
        tensors: of the adapter.
        name: of the tensor.
        shape: that it must have.
        module: whose it is.

    Raises:
        ModelError: it has another, or is empty, or does not hold floating point numbers.
    """
    require_weights(tensors, name)
    stored = tensors.shape(name)
    if 0 in stored:
        raise ModelError(
            f"the tensor {name} is empty, as those are that were saved from the shards of ZeRO-3: gather the adapter "
            "before it is saved."
        )
    if stored != shape:
        raise ModelError(
            f"the tensor {name} must have shape {shape} for {module.piece.path}, got {stored}: the adapter is of "
            "another model, or its configuration of another adapter."
        )
    return tensors.read(name).astype(np.float32)


def refuse_twins(modules: Sequence[Module]) -> None:
    """Refuse adapters of modules that are one of two with the same weights.

    Raises:
        ModelError: a module is.
    """
    if twins := [module for module in modules if module.piece.part.twin is not None]:
        raise ModelError(
            f"{twins[0].name} is a gate that is kept as one matrix with its other half (ReLU²), and adapters of the "
            "two would make them differ."
        )
