"""Recipes: YAML files of `RunConfig` fields, found by name or path, overridden by key, and checked strictly.

The command line, the notebook API and resumed runs all get their configuration here. Imports no jax.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.validation import validate

__all__ = [
    "add_config_options",
    "differing_fields",
    "from_yaml",
    "load_recipe",
    "override",
    "parse_arguments",
    "read_mapping",
    "recipe_names",
    "recipe_path",
    "sweep_path",
    "to_yaml",
    "validate",
]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def recipe_names() -> list[str]:
    """Names of the recipes that come with CramJAX, sorted."""
    return [path.stem for path in _files() if not _is_sweep(path.read_text(encoding="utf-8"))]


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
        f"there is no sweep {name!r}{_did_you_mean(name, list(sweeps))} Sweeps: {', '.join(sweeps)}; or give the path "
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
        f"there is no recipe {name!r}{_did_you_mean(name, recipe_names())} Recipes: {', '.join(recipe_names())}; or "
        "give the path of a YAML file."
    )


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Read a recipe, apply overrides, and check the result.

    Args:
        name_or_path: a recipe's name (`quickstart`) or a YAML file.
        overrides: `["optim.lr=2e-3", "--budget=10min"]`, or a mapping with dotted or nested keys.

    Raises:
        ConfigError: unknown recipe or key, wrong type, impossible combination.
    """
    path = recipe_path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file: a recipe is a YAML file.") from None
    if _is_sweep(text):
        raise ConfigError(f"{path} is a sweep (it has `axes`), not a recipe: run it with `cramjax sweep {path}`.")
    config = _build(_read_yaml(text, where=str(path)) | _override_leaves(overrides))
    validate(config)
    return config


def override(config: RunConfig, overrides: Sequence[str] | Mapping[str, Any]) -> RunConfig:
    """A configuration with some fields changed, checked; `overrides` as for `load_recipe`.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination.
    """
    changed = _build(dict(_leaves(asdict(config))) | _override_leaves(overrides))
    validate(changed)
    return changed


def _override_leaves(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        add_config_options(parser)
        overrides = parse_arguments(parser, [a if a.startswith("-") else f"--{a}" for a in overrides]).as_dict()
    return dict(_leaves(overrides))


def differing_fields(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Values in both of each field, by dotted key, in which two configurations differ."""
    left, right = dict(_leaves(asdict(a))), dict(_leaves(asdict(b)))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def from_yaml(text: str, where: str = "the configuration") -> RunConfig:
    """The configuration written by `to_yaml`, checked; `where` names its origin in error messages."""
    config = _build(_read_yaml(text, where))
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """Every field of a configuration as YAML; `from_yaml` gives the same configuration back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=100)


def add_config_options(parser: ArgumentParser) -> None:
    """Add one option per field of `RunConfig` to a parser, with its docstring as help."""
    parser.add_class_arguments(RunConfig, None, as_group=True)
    for action in parser._actions:
        if action.dest in _groups():  # `--optim FILE` also exists; one way to give values is enough to explain
            action.help = SUPPRESS


def parse_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse command-line arguments into those given, without defaults.

    Raises:
        ConfigError: unknown option, wrong type.
    """
    try:
        return parser.parse_args(list(arguments), defaults=False)
    except ArgumentError as error:
        raise _explain(error, parser, arguments) from None


@cache
def _recipes_dir() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _files() -> list[Path]:
    """Recipes and sweeps that come with CramJAX, by name."""
    return sorted(_recipes_dir().glob("*.yaml"), key=lambda path: path.stem)


def _is_sweep(text: str) -> bool:
    return re.search(r"^axes\s*:", text, re.MULTILINE) is not None


@cache
def _types() -> dict[str, Any]:
    """Dotted key → type, for every field of a run."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        if is_dataclass(hint):
            found |= {f"{name}.{key}": inner for key, inner in typing.get_type_hints(hint).items()}
        else:
            found[name] = hint
    return found


@cache
def _groups() -> tuple[str, ...]:
    hints = typing.get_type_hints(RunConfig)
    return tuple(name for name, hint in hints.items() if is_dataclass(hint))


@cache
def _value_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    return parser


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is given twice in one mapping (line {node.start_mark.line + 1} on).")
        return super().construct_mapping(node, deep)


def read_mapping(text: str, where: str) -> Mapping[str, Any]:
    """A YAML mapping, no key given twice; `where` names its origin in error messages.

    Raises:
        ConfigError: it is not valid YAML, or no mapping.
    """
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, Mapping):
        got = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(f"{where} must be a YAML mapping of fields such as `budget: 10min`, got {got}.")
    return loaded


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    loaded = read_mapping(text, where)
    try:
        return dict(_leaves(loaded))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every field in a nested mapping; every key is checked."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key in _groups():
            if not isinstance(value, Mapping):
                raise _not_a_group(key, value)
            yield from _leaves(value, f"{key}.")
        elif key in _types():
            yield key, value
        else:
            raise _unknown_key(key)


def _build(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with the given values, by dotted key, over the defaults."""
    # A text stays as it is, even if it looks like a list or like null, which the parser would read into it.
    texts = {k: v for k, v in values.items() if isinstance(v, str) and str in _alternatives(_types()[k])}
    others = {k: v for k, v in values.items() if k not in texts}
    if isinstance(others.get("budget"), int | float):
        texts["budget"] = str(others.pop("budget"))  # the budget itself then says that a unit is missing
    try:
        parsed = _value_parser().parse_object(_nested(others), defaults=False).as_dict()
    except ArgumentError as error:
        raise next((e for e in map(_type_error, others.items()) if e), ConfigError(str(error))) from None
    nested = _nested({**dict(_leaves(parsed)), **texts})
    hints = typing.get_type_hints(RunConfig)
    return RunConfig(**{name: _made(hints[name], value) for name, value in nested.items()})


def _made(hint: Any, value: Any) -> Any:
    """A value in which mappings that stand for dataclasses are dataclasses."""
    for option in _alternatives(hint):
        if is_dataclass(option) and isinstance(value, Mapping):
            hints = typing.get_type_hints(option)
            return option(**{name: _made(hints[name], inner) for name, inner in value.items()})  # pyright: ignore[reportCallIssue]
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_made(typing.get_args(option)[0], inner) for inner in value)
    return value


def _type_error(item: tuple[str, Any]) -> ConfigError | None:
    """What is wrong with one key's value, if anything."""
    try:
        _value_parser().parse_object(_nested(dict([item])), defaults=False)
    except ArgumentError:
        return _wrong_type(*item)
    return None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as a mapping of groups."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return nested


def _explain(error: ArgumentError, parser: ArgumentParser, arguments: Sequence[str]) -> ConfigError:
    """One clear message for what the parser refused."""
    message = str(error)
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown:
        option = re.search(r"(?:^|\s)-+([^\s=]+)", unknown[1])
        if option is None:
            return ConfigError(f"unexpected argument {unknown[1]!r}. {_usage(parser)}")
        return _unknown_key(option[1], extra=_own_options(parser), dashes="--")
    keyed = re.search(r'[Pp]arser key "([^"]+)"', message)
    if keyed:
        key = keyed[1]
        value = _given(key, arguments)
        if key not in _types() and key not in _groups():  # an option of the command's own
            wanted = next(
                (getattr(a.type, "__name__", "") for a in parser._actions if a.dest == key and a.type), "another value"
            )
            return ConfigError(f"--{key} must be {_TYPE_WORDS.get(wanted, wanted)}, got {value!r}. {_usage(parser)}")
        return _not_a_group(key, value) if key in _groups() else _wrong_type(key, value, dashes="--")
    bare = re.search(r"argument --(\S+): expected one argument", message)
    if bare and bare[1] in _types():
        return ConfigError(f"--{bare[1]} needs a value: {_describe(_types()[bare[1]])}.")
    return ConfigError(f"{' '.join(message.split())}. {_usage(parser)}")


_TYPE_WORDS = {"int": "an integer", "float": "a number"}


def _given(key: str, arguments: Sequence[str]) -> str | None:
    """What the command line gives for a key."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == f"--{key}":
            return following
        if word.startswith(f"--{key}="):
            return word.partition("=")[2]
    return None


def _own_options(parser: ArgumentParser) -> list[str]:
    """The parser's options that are not configuration fields."""
    names = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    return [name for name in names if len(name) > 1 and name.rstrip("+") not in _types() and name not in _groups()]


def _usage(parser: ArgumentParser) -> str:
    return f"See `{parser.prog} --help`."


def _unknown_key(key: str, extra: Sequence[str] = (), dashes: str = "") -> ConfigError:
    group, _, name = key.rpartition(".")
    siblings = [other.partition(".")[2] for other in _types() if other.startswith(f"{group}.")]
    near_siblings = [f"{group}.{other}" for other in difflib.get_close_matches(name, siblings, n=1)]
    same_name = [other for other in _types() if other.rpartition(".")[2] == name]
    near_keys = difflib.get_close_matches(key, [*_types(), *extra], n=1, cutoff=0.75)
    near = near_siblings or (same_name if len(same_name) == 1 else near_keys)
    if near:
        return ConfigError(f"unknown option {dashes}{key}; did you mean {dashes}{near[0]}?")
    if siblings:
        return ConfigError(f"unknown option {dashes}{key}. Fields of {group}: {', '.join(siblings)}.")
    return ConfigError(
        f"unknown option {dashes}{key}. Groups of fields: {', '.join(_groups())}; fields without a group: budget, seed."
    )


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    """How a sentence about a wrong word ends."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def _not_a_group(key: str, value: Any) -> ConfigError:
    first = next(k for k in _types() if k.startswith(f"{key}."))
    return ConfigError(f"{key} is a group of fields, got {value!r}: give its fields, for example {first}=….")


def _wrong_type(key: str, value: Any, dashes: str = "") -> ConfigError:
    hint = _types()[key]
    ending = "."
    for option in _alternatives(hint):
        if typing.get_origin(option) is Literal and isinstance(value, str):
            ending = _did_you_mean(value, [str(choice) for choice in typing.get_args(option)])
    quote = ""
    if str in _alternatives(hint) and not isinstance(value, str):
        quote = " In YAML, put quotes around a text that looks like something else."
    return ConfigError(f"{dashes}{key} must be {_describe(hint)}, got {value!r}{ending}{quote}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    described = []
    for option in _alternatives(hint):
        if typing.get_origin(option) is Literal:
            described.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        elif is_dataclass(option):
            described.append(f"a mapping of {', '.join(field.name for field in fields(option))}")
        elif typing.get_origin(option) in (list, tuple) and is_dataclass(typing.get_args(option)[0]):
            described.append(f"a list of mappings of {', '.join(f.name for f in fields(typing.get_args(option)[0]))}")
        elif typing.get_origin(option) in (list, tuple):
            texts = typing.get_args(option)[0] is str
            described.append("a list of texts such as [one, two]" if texts else "a list of integers such as [1, 2]")
        else:
            described.append(words[option])
    return " or ".join(described)
