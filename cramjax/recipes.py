"""Recipes: YAML files of `RunConfig` fields, found by name or path, overridden by key, and checked strictly.

The command line, the notebook API and resumed runs all get their configuration here. Imports no jax.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cramjax import loading
from cramjax.compression import METHODS, CompressConfig
from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.loading import Overrides, did_you_mean
from cramjax.validation import validate

_log = logging.getLogger(__name__)

_NOT_FIXED = ("model.from", "model.dropout", "model.mask_documents")
"""Fields of the model that are a run's own, whatever model it starts from."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with CramJAX, sorted."""
    return [path.stem for path in _files() if not _is_sweep(path.read_text(encoding="utf-8"))]


def tuning_recipe_names() -> list[str]:
    """Names of those that fine-tune a model."""
    return [name for name in recipe_names() if _has(_TUNING, (_recipes_dir() / f"{name}.yaml").read_text("utf-8"))]


def sweep_path(name_or_path: str | os.PathLike[str]) -> Path:
    """The YAML file of a sweep, given by its name or by a path.

    Raises:
        ConfigError: there is no such sweep or file.
    """
    sweeps = {path.stem: path for path in _files() if _is_sweep(path.read_text(encoding="utf-8"))}
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name in sweeps or path.is_file():
        return sweeps.get(name, path)
    if name in recipe_names():
        raise ConfigError(f"{name} is a recipe, and a sweep also has axes: write a YAML file with `base: {name}`.")
    raise ConfigError(
        f"there is no sweep {name!r}{did_you_mean(name, list(sweeps))} Sweeps: {', '.join(sweeps)}; or give the path "
        "of a YAML file."
    )


def recipe_path(name_or_path: str | os.PathLike[str]) -> Path:
    """The YAML file of a recipe, given by its name or by a path.

    Raises:
        ConfigError: there is no such recipe or file.
    """
    if not isinstance(name_or_path, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a recipe is a name or the path of a YAML file, got {name_or_path!r}.")
    name = os.fspath(name_or_path)
    if any(path.stem == name for path in _files()):
        return _recipes_dir() / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{name!r} is a directory, and a recipe is a name or a YAML file. To continue a run use --resume; to start "
            f"another with a run's configuration give {path / 'config.yaml'}."
        )
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"there is no recipe file {name!r}. Recipes by name: {', '.join(recipe_names())}.")
    raise ConfigError(
        f"there is no recipe {name!r}{did_you_mean(name, recipe_names())} Recipes: {', '.join(recipe_names())}; or "
        "give the path of a YAML file."
    )


def compression_names() -> list[str]:
    """Names of the compressions that come with CramJAX, sorted."""
    return sorted(path.stem for path in _compressions().glob("*.yaml"))


def load_compression(how: str | os.PathLike[str], overrides: Overrides = ()) -> CompressConfig:
    """A compression given by a method, by its name, or by the path of a YAML file; with some fields changed.

    Raises:
        ConfigError: there is none such, or as `cramjax.loading.load`.
    """
    name = os.fspath(how)
    if name in METHODS:
        return loading.from_yaml(CompressConfig, f"method: {name}", name, overrides)
    path = _compressions() / f"{name}.yaml" if name in compression_names() else Path(name).expanduser()
    if not path.is_file():
        known = [*METHODS, *compression_names()]
        raise ConfigError(
            f"there is no method {name!r}{did_you_mean(name, known)} Methods: {', '.join(METHODS)}; compressions by "
            f"name: {', '.join(compression_names())}; or give the path of a YAML file."
        )
    return loading.load(CompressConfig, path, overrides)


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Overrides = ()) -> RunConfig:
    """Read a recipe, apply overrides, and check the result.

    Args:
        name_or_path: a recipe's name (`quickstart`) or a YAML file.
        overrides: `["optim.lr=2e-3", "--budget=10min"]`, or a mapping with dotted or nested keys.

    Raises:
        ConfigError: unknown recipe or key, wrong type, number out of range, impossible combination.
    """
    path = recipe_path(name_or_path)
    text = loading.read_text(path)
    if _is_sweep(text):
        raise ConfigError(f"{path} is a sweep (it has `axes`), not a recipe: run it with `cramjax sweep {path}`.")
    made = _checked(loading.from_yaml(RunConfig, text, str(path), _renamed(overrides)))
    if made.adapter is None and loading.read_mapping(text, str(path)).get("adapter") is not None:
        _warn_of_rate(loading.from_yaml(RunConfig, text, str(path)), made)
    return _with_own_architecture(made, overrides)


def _warn_of_rate(recipe: RunConfig, made: RunConfig) -> None:
    """Say that the rate of a recipe's adapter is now that of all weights."""
    rate = made.optim.lr
    if rate == recipe.optim.lr and made.optim.name == recipe.optim.name:
        _log.warning(
            f"without the recipe's adapter all weights are trained at optim.lr={rate:g}, which was chosen for an "
            f"adapter, about ten times what suits all weights: give --optim.lr={rate / 10:g}, say."
        )


def override(config: RunConfig, overrides: Overrides) -> RunConfig:
    """A configuration with some fields changed, checked; arguments and errors as of `load_recipe`."""
    return _with_own_architecture(_checked(loading.changed(config, _renamed(overrides))), overrides)


def from_yaml(text: str, where: str = "the configuration") -> RunConfig:
    """The configuration written by `to_yaml`, checked; `where` names its origin in error messages."""
    return _checked(loading.from_yaml(RunConfig, text, where))


def to_yaml(config: RunConfig) -> str:
    """Every field of a configuration as YAML; `from_yaml` gives the same configuration back."""
    return loading.dump(config)


def differing_fields(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Values in both of each field, by dotted key, in which two configurations differ."""
    left, right = loading.leaves_of(a), loading.leaves_of(b)
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def add_config_options(parser: ArgumentParser) -> None:
    """Add one option per field of `RunConfig` to a parser, with its docstring as help."""
    loading.add_options(parser, RunConfig)


def parse_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse command-line arguments into those given, without defaults.

    Raises:
        ConfigError: unknown option, wrong type.
    """
    try:
        return loading.parse_arguments(parser, RunConfig, _renamed_words(arguments))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--start_from", "--model.from")) from None


def _renamed(overrides: Overrides) -> Overrides:
    """Overrides with `start_from` for `model.from`, which could be no field's name."""
    if not isinstance(overrides, Mapping):
        return _renamed_words(overrides)
    model = overrides.get("model")
    if isinstance(model, Mapping) and "from" in model:
        rest = {key: value for key, value in model.items() if key != "from"}
        return {**overrides, "model": rest, "start_from": model["from"]}
    return {"start_from" if key == "model.from" else key: value for key, value in overrides.items()}


def _renamed_words(words: Sequence[str]) -> list[str]:
    return [re.sub(r"^(--)?model\.from(?==|$)", r"\1start_from", word) for word in words]


def _with_own_architecture(config: RunConfig, overrides: Overrides) -> RunConfig:
    """The configuration, if it does not ask for another architecture than that of the model it starts from."""
    words = _dotted(overrides) if isinstance(overrides, Mapping) else [word.lstrip("-") for word in overrides]
    names = (word.partition("=")[0] for word in words)
    fixed = [name for name in names if name.startswith("model.") and name not in _NOT_FIXED]
    if config.start_from is not None and fixed:
        raise ConfigError(
            f"{', '.join(fixed)}: the architecture is that of {config.start_from}, with which this run starts: leave "
            "these out, or model.from."
        )
    return config


def _dotted(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The fields of a mapping whose keys are dotted or nested."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def _checked(config: RunConfig) -> RunConfig:
    validate(config)
    return config


@cache
def _recipes_dir() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _compressions() -> Path:
    return _recipes_dir() / "compress"


def _files() -> list[Path]:
    """Recipes and sweeps that come with CramJAX, by name."""
    return sorted(_recipes_dir().glob("*.yaml"), key=lambda path: path.stem)


_SWEEP, _TUNING = ("axes",), ("adapter", "examples", "labels")
"""Groups that a sweep has, and of which a recipe of fine-tuning has one."""


def _is_sweep(text: str) -> bool:
    return _has(_SWEEP, text)


def _has(groups: Sequence[str], text: str) -> bool:
    return re.search(rf"^({'|'.join(groups)})\s*:", text, re.MULTILINE) is not None
