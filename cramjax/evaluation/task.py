"""What a task is: a YAML file over labelled data, read by the strict loader, found by name or path. Imports no jax.

Those that come with CramJAX are in the folder `tasks`, and are examples of the form.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cramjax.errors import ConfigError
from cramjax.loading import did_you_mean, load
from cramjax.ranges import Count

_FOLDER = Path(__file__).resolve().parent / "tasks"

Step = Literal["strip", "lower", "punctuation", "articles", "spaces", "numbers"]


@dataclass(frozen=True)
class ChoiceConfig:
    """One of several continuations is right; the likeliest is the model's answer."""

    choices: tuple[str, ...] | str
    """Templates of the choices, or one {field} that holds a list of them."""
    gold: str
    """Field that says which choice is right: its text, its place from 0, or its letter, A for the first."""
    prompt: str = ""
    """Template of what comes before a choice."""
    delimiter: str = " "
    """Between prompt and choice; it does not count in the length of a choice."""
    labels: tuple[str, ...] | str | None = None
    """What the gold field holds for each choice in turn, or a {field} with a list of it, where it holds other words."""


@dataclass(frozen=True)
class PairsConfig:
    """Two texts of which one is good; the model should find that one likelier."""

    good: str
    """Template of the good text."""
    bad: str
    """Template of the bad text."""
    prompt: str = ""
    """Template of what comes before either. A masked model takes none."""
    delimiter: str = ""
    """Between prompt and text, and before a text without a prompt. A masked model takes none."""


@dataclass(frozen=True)
class GenerateConfig:
    """The likeliest continuation, token by token, is compared with the right answer."""

    answer: str
    """Template of the right answer. A {field} alone that holds a list: any of them is right."""
    prompt: str = ""
    """Template of what is continued."""
    delimiter: str = " "
    """Between prompt and answer in examples."""
    stop: tuple[str, ...] = ("\n",)
    """Texts at the first of which the continuation ends."""
    max_tokens: Count = 64
    """Most tokens of the continuation."""
    extract: str | None = None
    """Regular expression of what counts (its first group, if it has one), in the continuation and in the answer. Where
    an answer has none of it, all of the answer counts."""
    normalise: tuple[Step, ...] = ("strip",)
    """What is done to both before they are compared, in turn. strip: no white space at the ends; lower: lower case;
    punctuation: none of ASCII's; articles: no a, an, the; spaces: one for any white space; numbers: no comma or dollar
    sign, and no full stop at the end."""


@dataclass(frozen=True)
class TextConfig:
    """All tokens of a text, each once; scored in bits per byte."""

    text: str
    """Template of the text."""


@dataclass(frozen=True)
class FewshotConfig:
    """Solved examples before each prompt: the first rows, which are then not scored, or those of another file."""

    examples: Count
    """How many."""
    data: str | None = None
    """Where they come from, as of the task's data."""
    split: str = "train"
    """Which split, if that is a directory of several saved by datasets."""
    separator: str = "\n\n"
    """Between examples."""


@dataclass(frozen=True)
class TaskConfig:
    """A task. It is of the one kind that is given: choice, pairs, generate or text."""

    data: str | None = None
    """A file (.jsonl, .csv, .tsv, .parquet) or a directory saved by datasets, beside the task's file or from here; or
    made:NAME. Without it, it must be given with the task."""
    split: str = "test"
    """Which split, if the data is a directory of several."""
    choice: ChoiceConfig | None = None
    """Multiple choice."""
    pairs: PairsConfig | None = None
    """Minimal pairs."""
    generate: GenerateConfig | None = None
    """Continuations."""
    text: TextConfig | None = None
    """Texts."""
    fewshot: FewshotConfig | None = None
    """Examples, of choice and generate."""
    description: str = ""
    """Before all else of a prompt, of choice and generate; with chat, the system's message."""
    chat: bool = False
    """Whether a prompt is put into the model's chat template, as what a user says; of choice and generate."""
    limit: Count | None = None
    """Most rows that are scored, the first ones. null: all."""


@dataclass(frozen=True)
class Task:
    """A task and what it is called."""

    name: str
    config: TaskConfig
    folder: Path = Path()
    """Where paths in it start."""

    @property
    def kind(self) -> Literal["choice", "pairs", "generate", "text"]:
        """The kind that is given."""
        return _kinds(self.config)[0]

    def source(self, given: str | os.PathLike[str] | None = None) -> str | Path:
        """Where its rows are.

        Args:
            given: data to take in the place of its own.

        Raises:
            ConfigError: it has none, and none is given.
        """
        if given is not None:
            return given if isinstance(given, str) else Path(given)
        if self.config.data is None:
            raise ConfigError(f"the task {self.name} comes without data: give its file, --data {self.name}=FILE.")
        return self._found(self.config.data)

    def fewshot_source(self) -> str | Path | None:
        """Where its examples are, if apart from its rows."""
        config = self.config.fewshot
        return None if config is None or config.data is None else self._found(config.data)

    def _found(self, data: str) -> str | Path:
        beside = self.folder / data
        return beside if beside.exists() else data


def task_names() -> list[str]:
    """Names of the tasks that come with CramJAX, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_task(name_or_path: str | os.PathLike[str]) -> Task:
    """A task, given by its name or by the path of a YAML file.

    Raises:
        ConfigError: there is no such task; or what is in the file is no task.
    """
    name = os.fspath(name_or_path)
    path = _FOLDER / f"{name}.yaml" if name in task_names() else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"there is no task {name!r}{did_you_mean(name, task_names())} Tasks: {', '.join(task_names())}; or give "
            "the path of a YAML file."
        )
    config = load(TaskConfig, path)
    try:
        check_task(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Task(path.stem, config, path.resolve().parent)


def check_task(config: TaskConfig) -> None:
    """Refuse what no task is.

    Raises:
        ConfigError: not exactly one kind, or options that its kind does not have.
    """
    kinds = _kinds(config)
    if len(kinds) != 1:
        raise ConfigError(
            f"a task has one of choice, pairs, generate and text, got {', '.join(kinds) or 'none'}: give one."
        )
    if kinds[0] in ("pairs", "text"):
        given = {"fewshot": config.fewshot, "description": config.description, "chat": config.chat}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(f"{wrong[0]} is of choice and generate, and this task is {kinds[0]}: leave it out.")


def _kinds(config: TaskConfig) -> list[Literal["choice", "pairs", "generate", "text"]]:
    given = {"choice": config.choice, "pairs": config.pairs, "generate": config.generate, "text": config.text}
    return [kind for kind, value in given.items() if value is not None]  # pyright: ignore[reportReturnType]
