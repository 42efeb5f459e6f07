"""The one strict loader: YAML, mappings and command-line options into a frozen dataclass, every key and value checked.

A verb's configuration is a dataclass (`RunConfig`, `SweepConfig`), whose fields may be dataclasses themselves, its
groups. A key is a dotted path of fields. Ranges of numbers stand with the fields (`cramjax.ranges`). Imports no jax.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from cramjax.errors import ConfigError
from cramjax.ranges import Range

Config = TypeVar("Config")
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes to a configuration: `["optim.lr=2e-3", "--budget=10min"]`, or a mapping with dotted or nested keys."""

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def load(cls: type[Config], file: str | os.PathLike[str], overrides: Overrides = ()) -> Config:
    """Read a configuration from a YAML file, and apply overrides.

    Args:
        cls: the dataclass that it is.
        file: with fields of `cls`.
        overrides: changes to what is in the file.

    Raises:
        ConfigError: no text, no YAML, an unknown key, a wrong type, or a number out of its range.
    """
    return from_yaml(cls, read_text(file), str(file), overrides)


def from_yaml(cls: type[Config], text: str, where: str, overrides: Overrides = ()) -> Config:
    """The same from YAML itself; `where` names its origin in error messages."""
    loaded = read_mapping(text, where)
    try:
        given = dict(_leaves(cls, loaded))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return _build(cls, _merged(given, _override_leaves(cls, overrides)))


def from_mapping(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """The same from fields by dotted or nested keys."""
    return _build(cls, dict(_leaves(cls, mapping)))


def changed(config: Config, overrides: Overrides) -> Config:
    """A configuration with some fields changed. Raises as `load`."""
    cls = type(config)
    return _build(cls, _merged(leaves_of(config), _override_leaves(cls, overrides)))


def leaves_of(config: Any) -> dict[str, Any]:
    """Values of a configuration by dotted key."""
    return dict(_leaves(type(config), asdict(config)))


def dump(config: Any) -> str:
    """Every field of a configuration as YAML; `from_yaml` gives the same configuration back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=100)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every number of a configuration, however it was made.

    Raises:
        ConfigError: one is out of its field's range.
    """
    for name, allowed in _ranges(type(config)).items():
        value = getattr(config, name)
        for place, part in enumerate(value) if isinstance(value, tuple) else [("", value)]:
            key = f"{prefix}{name}" + ("" if place == "" else f"[{place}]")
            if is_dataclass(part):
                check_ranges(part, f"{key}.")
            elif allowed and isinstance(part, int | float) and not allowed.contains(part):
                raise ConfigError(f"{key} must be {allowed.words}, got {part:g}.")


@cache
def _ranges(cls: type[Any]) -> dict[str, Range | None]:
    return {name: range_of(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def range_of(hint: Any) -> Range | None:
    """The range that a field's type has, if any."""
    for option in _alternatives(hint):
        if typing.get_origin(option) is Annotated:
            return next((extra for extra in option.__metadata__ if isinstance(extra, Range)), None)
    return None


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        ConfigError: it holds no text.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{os.fspath(file)} is not a text file: a configuration is a YAML file.") from None


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


def add_options(parser: ArgumentParser, cls: type[Any]) -> None:
    """Add one option per field of a configuration to a parser, with its docstring as help."""
    parser.add_class_arguments(cls, None, as_group=True)
    types_ = _types(cls)
    for action in parser._actions:
        if action.dest in _groups(cls) and not _may_be_null(
            cls, action.dest
        ):  # `--optim FILE` also exists; one way to give values is enough to explain
            action.help = SUPPRESS
        elif action.dest in types_ and hasattr(action, "_typehint"):
            action._typehint = types_[action.dest]  # pyright: ignore[reportAttributeAccessIssue]  # without its range


def parse_arguments(parser: ArgumentParser, cls: type[Any], arguments: Sequence[str]) -> Namespace:
    """Parse command-line arguments into those given, without defaults.

    Args:
        parser: to which `add_options` has added those of
        cls: the configuration.
        arguments: the words.

    Raises:
        ConfigError: unknown option, wrong type.
    """
    try:
        return parser.parse_args(list(arguments), defaults=False)
    except ArgumentError as error:
        raise _explain(error, parser, cls, arguments) from None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """How a sentence about a wrong word ends."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is given twice in one mapping (line {node.start_mark.line + 1} on).")
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class _Group:
    """A field that is a dataclass, or null."""

    cls: type[Any]
    optional: bool


@cache
def _fields(cls: type[Any]) -> dict[str, _Group | Any]:
    """Dotted key → type without its range, for every field; groups as such, before their fields."""
    found: dict[str, _Group | Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        inner = next((option for option in _alternatives(hint) if is_dataclass(option)), None)
        if inner is None:
            found[name] = hint
        else:
            found[name] = _Group(inner, types.NoneType in _alternatives(hint))  # pyright: ignore[reportArgumentType]
            found |= {f"{name}.{key}": below for key, below in _fields(inner).items()}
    return found


def _types(cls: type[Any]) -> dict[str, Any]:
    return {key: hint for key, hint in _fields(cls).items() if not isinstance(hint, _Group)}


def _groups(cls: type[Any]) -> dict[str, _Group]:
    return {key: hint for key, hint in _fields(cls).items() if isinstance(hint, _Group)}


@cache
def _value_parser(cls: type[Any]) -> ArgumentParser:
    """A parser of values alone, for which no field is required and no group is a type."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for key, hint in _types(cls).items():
        parser.add_argument(f"--{key}", type=hint)
    return parser


def _override_leaves(cls: type[Any], overrides: Overrides) -> dict[str, Any]:
    if not isinstance(overrides, Mapping):
        words = [a if a.startswith("-") else f"--{a}" for a in overrides]
        whole = {key: value for word in words for key, _, value in [word[2:].partition("=")] if _may_be_null(cls, key)}
        words = [word for word in words if word[2:].partition("=")[0] not in whole]
        parsed = parse_arguments(_value_parser(cls), cls, words).as_dict()
        overrides = {**parsed, **{key: _whole_group(cls, key, value) for key, value in whole.items()}}
    return dict(_leaves(cls, overrides))


def _whole_group(cls: type[Any], key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise _not_a_group(cls, key, value) from None


def _may_be_null(cls: type[Any], key: str) -> bool:
    group = _groups(cls).get(key)
    return group is not None and group.optional


def _leaves(cls: type[Any], mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every field in a nested mapping; every key is checked."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        hint = _fields(cls).get(key)
        if isinstance(hint, _Group) and isinstance(value, Mapping):
            yield from _leaves(cls, value, f"{key}.")
        elif isinstance(hint, _Group) and not (hint.optional and value is None):
            raise _not_a_group(cls, key, value)
        elif hint is not None:
            yield key, value
        else:
            raise _unknown_key(cls, key)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key with changes; a group that is null gives way to its fields, and they to null."""
    kept = {
        key: value
        for key, value in values.items()
        if not any(key.startswith(f"{new}.") or new.startswith(f"{key}.") for new in changes)
    }
    return kept | dict(changes)


def _build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration with the given values, by dotted key, over the defaults."""
    hints = _types(cls)
    for key, value in values.items():  # null is a default of the parser's, which it does not check
        if value is None and key in hints and types.NoneType not in _alternatives(hints[key]):
            raise _wrong_type(cls, key, value)
    # A text stays as it is, even if it looks like a list or like null, which the parser would read into it. So does
    # what has no type of its own.
    kept = {k: v for k, v in values.items() if k in hints and _is_kept(hints[k], v)}
    others = {k: v for k, v in values.items() if k not in kept}
    if isinstance(others.get("budget"), int | float):
        kept["budget"] = str(others.pop("budget"))  # the budget itself then says that a unit is missing
    try:
        parsed = _value_parser(cls).parse_object(_nested(others), defaults=False).as_dict()
    except ArgumentError as error:
        raise next((e for e in (_type_error(cls, *o) for o in others.items()) if e), ConfigError(str(error))) from None
    config = _made(cls, _nested({**dict(_leaves(cls, parsed)), **kept}), "")
    check_ranges(config)
    return config


def _is_kept(hint: Any, value: Any) -> bool:
    return any(
        (option is str and isinstance(value, str))
        or (typing.get_origin(option) is dict and isinstance(value, Mapping))
        or (option == list[Any] and isinstance(value, list))
        for option in _alternatives(hint)
    )


def _made(cls: Any, values: Mapping[str, Any], key: str) -> Any:
    """A dataclass from its fields, of which those that are dataclasses are mappings."""
    hints = typing.get_type_hints(cls)
    for name in _required(cls):
        if name not in values:
            raise _not_given(f"{key}{name}", hints[name])
    return cls(**{name: _value(hints[name], value, f"{key}{name}") for name, value in values.items()})


def _required(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def _value(hint: Any, value: Any, key: str) -> Any:
    for option in _alternatives(hint):
        if is_dataclass(option) and isinstance(value, Mapping | Namespace):
            return _made(option, value if isinstance(value, Mapping) else value.as_dict(), f"{key}.")
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_value(typing.get_args(option)[0], part, f"{key}[{i}]") for i, part in enumerate(value))
    return value


def _type_error(cls: type[Any], key: str, value: Any) -> ConfigError | None:
    """What is wrong with one key's value, if anything."""
    try:
        _value_parser(cls).parse_object(_nested({key: value}), defaults=False)
    except ArgumentError:
        return _wrong_type(cls, key, value)
    return None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as a mapping of groups."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested


def _explain(error: ArgumentError, parser: ArgumentParser, cls: type[Any], arguments: Sequence[str]) -> ConfigError:
    """One clear message for what the parser refused."""
    message = str(error)
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown:
        option = re.search(r"(?:^|\s)-+([^\s=]+)", unknown[1])
        if option is None:
            return ConfigError(f"unexpected argument {unknown[1]!r}. {_usage(parser)}")
        if option[1] in _groups(cls):
            return _not_a_group(cls, option[1], _given(option[1], arguments))
        return _unknown_key(cls, option[1], extra=_own_options(parser, cls), dashes="--")
    keyed = re.search(r'[Pp]arser key "([^"]+)"', message)
    if keyed:
        key = keyed[1]
        value = _given(key, arguments)
        if key not in _fields(cls):  # an option of the command's own
            wanted = next(
                (getattr(a.type, "__name__", "") for a in parser._actions if a.dest == key and a.type), "another value"
            )
            return ConfigError(f"--{key} must be {_TYPE_WORDS.get(wanted, wanted)}, got {value!r}. {_usage(parser)}")
        if key in _types(cls):
            return _wrong_type(cls, key, value, dashes="--")
        group = _groups(cls)[key].cls
        lacking = [name for name in _required(group) if _given(f"{key}.{name}", arguments) is None]
        if value is None and lacking:
            return _not_given(f"{key}.{lacking[0]}", typing.get_type_hints(group)[lacking[0]], dashes="--")
        below = [other for other in _types(cls) if other.startswith(f"{key}.") and _given(other, arguments) is not None]
        for other in below if value is None else []:  # of an optional group, the parser names the group alone
            if _type_error(cls, other, _read(_given(other, arguments) or "")):
                return _wrong_type(cls, other, _given(other, arguments), dashes="--")
        named = [word.lstrip("-").partition("=")[0] for word in arguments if word.startswith(f"--{key}.")]
        if value is None and (unknown := [name for name in named if name not in _types(cls)]):
            return _unknown_key(cls, unknown[0], dashes="--")
        return _not_a_group(cls, key, value)
    bare = re.search(r"argument --(\S+): expected one argument", message)
    if bare and bare[1] in _types(cls):
        return ConfigError(f"--{bare[1]} needs a value: {_describe(_types(cls)[bare[1]])}.")
    return ConfigError(f"{' '.join(message.split())}. {_usage(parser)}")


_TYPE_WORDS = {"int": "an integer", "float": "a number"}


def _read(word: str) -> Any:
    """The value that a word of the command line stands for."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _given(key: str, arguments: Sequence[str]) -> str | None:
    """What the command line gives for a key."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == f"--{key}":
            return following
        if word.startswith(f"--{key}="):
            return word.partition("=")[2]
    return None


def _own_options(parser: ArgumentParser, cls: type[Any]) -> list[str]:
    """The parser's options that are not configuration fields."""
    names = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    return [name for name in names if len(name) > 1 and name.rstrip("+") not in _fields(cls)]


def _usage(parser: ArgumentParser) -> str:
    return f"See `{parser.prog} --help`."


def _unknown_key(cls: type[Any], key: str, extra: Sequence[str] = (), dashes: str = "") -> ConfigError:
    group, _, name = key.rpartition(".")
    known = list(_types(cls))
    siblings = [other.rpartition(".")[2] for other in _fields(cls) if other.rpartition(".")[0] == group and group]
    near_siblings = [f"{group}.{other}" for other in difflib.get_close_matches(name, siblings, n=1)]
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    near_keys = difflib.get_close_matches(key, [*known, *extra], n=1, cutoff=0.75)
    near = near_siblings or (same_name if len(same_name) == 1 else near_keys)
    if near:
        return ConfigError(f"unknown option {dashes}{key}; did you mean {dashes}{near[0]}?")
    if siblings:
        return ConfigError(f"unknown option {dashes}{key}. Fields of {group}: {', '.join(siblings)}.")
    groups = ", ".join(key for key in _groups(cls) if "." not in key)
    alone = ", ".join(key for key in known if "." not in key)
    return ConfigError(f"unknown option {dashes}{key}. Groups of fields: {groups}; fields without a group: {alone}.")


def _not_given(key: str, hint: Any, dashes: str = "") -> ConfigError:
    return ConfigError(f"{dashes}{key} must be given: {_describe(hint)}.")


def _not_a_group(cls: type[Any], key: str, value: Any) -> ConfigError:
    first = next(k for k in _types(cls) if k.startswith(f"{key}."))
    return ConfigError(f"{key} is a group of fields, got {value!r}: give its fields, for example {first}=….")


def _wrong_type(cls: type[Any], key: str, value: Any, dashes: str = "") -> ConfigError:
    hint = _types(cls)[key]
    ending = "."
    for option in _alternatives(hint):
        if typing.get_origin(option) is Literal and isinstance(value, str):
            ending = did_you_mean(value, [str(choice) for choice in typing.get_args(option)])
    quote = ""
    if str in _alternatives(hint) and not isinstance(value, str):
        quote = " In YAML, put quotes around a text that looks like something else."
    return ConfigError(f"{dashes}{key} must be {_describe(hint)}, got {value!r}{ending}{quote}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _describe(hint: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    described = []
    for option in _alternatives(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Literal:
            described.append(f"one of {', '.join(map(str, arguments))}")
        elif is_dataclass(option):
            described.append(f"a mapping of {', '.join(field.name for field in fields(option))}")
        elif origin is dict:
            described.append("a mapping")
        elif origin in (list, tuple) and is_dataclass(arguments[0]):
            described.append(f"a list of mappings of {', '.join(field.name for field in fields(arguments[0]))}")
        elif origin in (list, tuple):
            described.append(f"a list of {_LISTS.get(arguments[0], 'values such as [1, 2]')}")
        else:
            described.append(words[option])
    return " or ".join(described)


_LISTS = {str: "texts such as [one, two]", int: "integers such as [1, 2]"}
