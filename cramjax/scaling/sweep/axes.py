"""The sweep file: a base recipe and axes, read into trials, each a name and a whole configuration.

A trial's name says what varies and nothing else, so that a sweep that is run again finds what is there.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from cramjax.budget import Budget
from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.loading import from_mapping, load
from cramjax.recipes import load_recipe, sweep_path
from cramjax.scaling.sweep.config import IsoFlopConfig, SweepConfig

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}

Point = dict[str, Any]
"""What one axis says of one trial: values by dotted field."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    config: RunConfig


def read_sweep(
    sweep: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> list[Trial]:
    """The trials of a sweep, smallest budgets first where they differ.

    Args:
        sweep: the name or the path of a YAML file with `base` (a recipe), perhaps `set` (fields that differ from it in
            every trial), and `axes`: any of `grid: {field: [values]}` (all combinations), `zip: {field: [values], …}`
            (values taken together) and `isoflop: {budgets, sizes}`. Several axes are combined. Or that as a mapping.
        overrides: fields by dotted key, over `set`.

    Raises:
        ConfigError: the file, a field, a value, or a derived size cannot be.
    """
    if isinstance(sweep, Mapping):
        return _trials(from_mapping(SweepConfig, sweep), Path(), overrides or {})
    path = sweep_path(sweep)
    try:
        return _trials(load(SweepConfig, path), path.parent, overrides or {})
    except ConfigError as error:
        message = str(error)
        raise error if message.startswith(str(path)) else ConfigError(f"{path}: {message}") from None


def _trials(sweep: SweepConfig, folder: Path, overrides: Mapping[str, Any]) -> list[Trial]:
    axes, isoflop = sweep.axes, sweep.axes.isoflop
    given = {**_flat(sweep.set or {}), **_flat(overrides)}
    beside = folder / sweep.base
    recipe = beside if beside.is_file() else sweep.base
    points = _combine(_grid(axes.grid or {}), _zip(axes.zip or {}))
    for field in given.keys() & points[0].keys():
        raise ConfigError(f"{field} is both set and an axis: give it once.")
    if isoflop is None and not points[0]:
        raise ConfigError("a sweep needs `axes` with values, one or more of grid, zip, isoflop: it has none.")
    if isoflop is not None and "budget" in {**given, **points[0]}:
        raise ConfigError("budget is given, but axes.isoflop has the budgets of its own: give one or the other.")
    short = _short_names(list(points[0]))
    trials = []
    for point in points:
        config = load_recipe(recipe, {**given, **point})
        label = "_".join(f"{short[field]}={_slug(value)}" for field, value in point.items())
        if isoflop is None:
            trials.append(Trial(label, config))
        else:
            shaped = _isoflop(isoflop, config)
            trials += [replace(t, name="_".join(filter(None, (t.name, label)))) for t in shaped]
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two trials are the same, {name}: give each value of an axis once.")
    if all(Budget.parse(trial.config.budget).unit == "flops" for trial in trials):
        trials.sort(key=lambda trial: Budget.parse(trial.config.budget).amount)
    return trials


def _grid(axis: Mapping[str, Any]) -> list[Point]:
    fields = _fields("grid", axis)
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def _zip(axis: Mapping[str, Any]) -> list[Point]:
    fields = _fields("zip", axis)
    if len({len(values) for values in fields.values()}) > 1:
        lengths = ", ".join(f"{field} has {len(values)}" for field, values in fields.items())
        raise ConfigError(f"axes.zip takes values together, so its lists must be equally long: {lengths}.")
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)] if fields else [{}]


def _combine(first: list[Point], second: list[Point]) -> list[Point]:
    for field in first[0].keys() & second[0].keys():
        raise ConfigError(f"{field} is in two axes: give it in one.")
    return [{**a, **b} for a, b in itertools.product(first, second)]


def _fields(axis: str, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of values of a grid or zip, by dotted field."""
    fields = _flat(content)
    for field, values in fields.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"axes.{axis}: {field} must have a list of values, got {values!r}.")
    return fields


def _isoflop(axis: IsoFlopConfig, base: RunConfig) -> list[Trial]:
    """Sizes × FLOP budgets, each model derived from its size."""
    if base.start_from is not None:
        raise ConfigError(
            "axes.isoflop derives models from sizes, and this recipe starts from a model that there is (model.from, "
            "start_from): sweep it along grid or zip."
        )
    from cramjax.scaling.shapes import shape_for  # which counts parameters with the model's own code: jax
    from cramjax.show.numbers import format_count

    budgets, sizes = axis.budgets, axis.sizes
    for name, values in (("budgets", budgets), ("sizes", sizes)):
        if not values:
            raise ConfigError(f"axes.isoflop.{name} must be a list with values, got {values!r}.")
    each = sizes if any(isinstance(size, list) for size in sizes) else [sizes] * len(budgets)
    if len(each) != len(budgets) or not all(isinstance(row, list) and row for row in each):
        raise ConfigError(
            f"axes.isoflop.sizes must be one list for all budgets, or a list of lists, one for each of the "
            f"{len(budgets)} budgets; got {len(each)} entries."
        )
    tuned_at = None if axis.tuned_at is None else _flops(axis.tuned_at)
    trials = []
    for budget, row in zip(map(_flops, budgets), each, strict=True):
        realised: dict[tuple[int, int], str] = {}
        for size in row:
            config = shape_for(_size(size), base, count=axis.count, flops=budget, tuned_at=tuned_at)
            shape = (config.model.layers, config.model.width)
            if shape in realised:
                raise ConfigError(
                    f"sizes {realised[shape]} and {size} are the same model ({shape[0]} layers × {shape[1]}) at "
                    f"{budget:g} FLOPs: space them further."
                )
            realised[shape] = str(size)
            name = f"{_compact(budget)}flop_{format_count(_size(size))}"
            trials.append(Trial(name, replace(config, budget=f"{_compact(budget)}flop")))
    return trials


def _flops(value: Any) -> float:
    try:
        return Budget.parse(f"{float(value)!r}flop").amount
    except (TypeError, ValueError):
        pass
    budget = Budget.parse(str(value))
    if budget.unit != "flops":
        raise ConfigError(f"an IsoFLOP budget must be FLOPs, such as 1e15flop, got {value!r}.")
    return budget.amount


def _size(value: Any) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([kmbg]?)", str(value).strip().lower())
    try:
        if match and float(match[1]) > 0:
            return float(match[1]) * _SCALES[match[2]]
    except ValueError:
        pass
    raise ConfigError(
        f"a size must be a positive number of parameters, such as 3.5M or 1e6 (k, M, B and G are known), got {value!r}."
    )


def _compact(number: float) -> str:
    """`3.2e12`, whole: a budget that is read again is the same."""
    digits, exponent = f"{Decimal(repr(number)).normalize():e}".split("e")
    return f"{digits}e{int(exponent)}"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted key; whether they exist is for the recipe to say."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """Fields by their last word where that tells them apart."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: word if last.count(word) == 1 else field for field, word in zip(fields, last, strict=True)}


def _slug(value: Any) -> str:
    """A value as part of a file name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "empty"
