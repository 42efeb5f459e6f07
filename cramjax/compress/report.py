"""What a compression came to: errors of matrices, bytes and bits, time, and bits per byte of text."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cramjax.show.values import Viewed

if TYPE_CHECKING:
    from cramjax.show.tables import Page


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of one block."""

    block: int
    """Number of the step of the walk."""
    name: str
    """In its block."""
    shape: tuple[int, ...]
    """Inputs and outputs; of a block's experts, how many they are before these: what follows is their mean or sum."""
    error: float
    """What its outputs for the calibration's inputs are off by, as a share of their energy (squared); without
    calibration, its weights."""
    zeros: float
    """Share of its weights that are 0."""
    seconds: float
    """That it took."""
    damp: float | None
    """What was added to its Hessian's diagonal, as a share of the mean; None: it was not factored."""
    dead: int
    """Inputs that were always 0."""
    unseen: int = 0
    """Experts that no row of the text was sent to."""


@dataclass(frozen=True)
class Size:
    """Bytes of a part of the model in its files."""

    part: str
    before: int
    after: int
    parameters: int

    @property
    def bits(self) -> float:
        """Per parameter, after, with everything counted: codes, scales and zeros, or the bits that say what is 0."""
        return 8 * self.after / self.parameters


@dataclass(frozen=True, repr=False)
class Compression(Viewed):
    """A model that was compressed."""

    model: Path
    """What was compressed."""
    out: Path
    """The model directory."""
    config: Mapping[str, Any]
    """Options, with defaults filled in."""
    tokens: int
    """Of calibration; 0: there was none."""
    matrices: tuple[MatrixReport, ...]
    sizes: tuple[Size, ...]
    """Parts of the model; together they are all of it."""
    seconds: float
    """That its matrices took, with their Hessians, over all attempts."""
    bits_per_byte: tuple[float, float] | None
    """Of held-out text, before and after; None: there is none."""
    notes: tuple[str, ...] = field(default=())
    """What a reader should know."""

    @property
    def total(self) -> Size:
        """Of the whole model."""
        own = self.sizes
        return Size("all", sum(s.before for s in own), sum(s.after for s in own), sum(s.parameters for s in own))

    def record(self) -> dict[str, Any]:
        """What `of` makes the same of, in JSON's types."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Compression":
        """That of a record."""
        score = record["bits_per_byte"]
        parts: dict[str, Any] = {
            "model": Path(record["model"]),
            "out": Path(record["out"]),
            "matrices": tuple(MatrixReport(**{**row, "shape": tuple(row["shape"])}) for row in record["matrices"]),
            "sizes": tuple(Size(**row) for row in record["sizes"]),
            "bits_per_byte": None if score is None else tuple(score),
            "notes": tuple(record["notes"]),
        }
        return cls(**{**record, **parts})

    def json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        sizes = [{**asdict(size), "bits_per_parameter": size.bits} for size in (*self.sizes, self.total)]
        scores = None if self.bits_per_byte is None else dict(zip(("before", "after"), self.bits_per_byte, strict=True))
        return {
            "model": str(self.model),
            "options": dict(self.config),
            "calibration_tokens": self.tokens,
            "seconds": self.seconds,
            "bits_per_byte": scores,
            "bytes": sizes,
            "notes": list(self.notes),
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }

    def __rich__(self) -> "Page":
        from cramjax.compress.show import page

        return page(self)
