"""What a sweep file holds: a base recipe, fields that differ from it in every trial, and axes."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class IsoFlopConfig:
    """Sizes times budgets of FLOPs; width, depth, heads, batch and learning rates are derived from each size."""

    budgets: list[Any]
    """FLOPs, such as 1e12flop."""
    sizes: list[Any]
    """Numbers of parameters, such as 300k: one list for all budgets, or a list of lists, one for each."""
    count: Literal["params", "params_non_embedding"] = "params"
    """Which parameters a size counts: all, or those of the blocks."""
    tuned_at: str | float | None = None
    """FLOPs that the base's batch is right for: it then grows with the budget."""


@dataclass(frozen=True)
class AxesConfig:
    """What varies. Several axes are combined with each other."""

    grid: dict[str, Any] | None = None
    """Lists of values by field: all combinations."""
    zip: dict[str, Any] | None = None
    """Lists of values by field, equally long: taken together."""
    isoflop: IsoFlopConfig | None = None
    """Sizes times budgets."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep."""

    base: str
    """A recipe: its name, or a YAML file, beside the sweep's or from here."""
    set: dict[str, Any] | None = None
    """Fields of a run that differ from the base in every trial."""
    axes: AxesConfig = field(default_factory=AxesConfig)
