"""What a model is tuned on, as a configuration. Imports no jax."""

from dataclasses import dataclass, field
from typing import Literal

from cramjax.ranges import Count, InnerShare, ShareBelowOne

Format = Literal["chat", "completion", "text", "preference"]

FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "labels": ("text", "pair", "label"),
}
"""What each format reads of a row."""


@dataclass(frozen=True)
class ExamplesConfig:
    """Where examples come from, and what of them is to be predicted."""

    source: str | list[str] = ""
    """JSONL, JSON, CSV, TSV or Parquet files (also .gz, .bz2, .xz, .zst), globs of them, a directory saved by Hugging
    Face `datasets`, or `hub:NAME`."""
    format: Format = "chat"
    """`chat`: conversations, as `messages: [{role, content}]` or `conversations: [{from, value}]`; what the assistant
    says is predicted, and the token that ends its turn. `completion`: `prompt` and `completion`, of which the second
    is predicted. `text`: all of it is. `preference`: `prompt` and two answers, `chosen` and `rejected`, all texts or
    all lists of turns: the first is to become likelier than the second (DPO: Rafailov et al. 2023,
    arXiv:2305.18290)."""
    validation: str | list[str] | None = None
    """Held-out examples, given like `source`. Without it, examples are held out of `source`."""
    validation_fraction: InnerShare = 0.05
    """Share of examples held out when `validation` is not given."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of fields where they are others than the format's own: `{prompt: question, completion: answer}`."""
    template: str = "auto"
    """Jinja template that makes a text of a conversation: the model's own (`auto`; a plain one, if it has none), the
    plain one (`plain`), or the path of a file."""
    overlong: Literal["error", "drop", "cut"] = "cut"
    """What becomes of an example longer than a row: an error, nothing, or its beginning. It is counted and said."""
    hub_config: str | None = None
    """Configuration name of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set, or of a saved one."""
    cache_dir: str | None = None
    """Where prepared examples are kept. Default: `$CRAMJAX_CACHE`, else `~/.cache/cramjax`."""

    @property
    def objective(self) -> Literal["examples", "preference"]:
        """What is made of them: `ObjectiveConfig.kind`."""
        return "preference" if self.format == "preference" else "examples"

    @property
    def together(self) -> int:
        """Examples that a row of data makes, which stay together."""
        return 2 if self.format == "preference" else 1


@dataclass(frozen=True)
class LabelsConfig:
    """Where labelled texts come from, and what their labels are."""

    source: str | list[str] = ""
    """JSONL, JSON, CSV, TSV or Parquet files (also .gz, .bz2, .xz, .zst), globs of them, a directory saved by Hugging
    Face `datasets`, or `hub:NAME`."""
    target: Literal["class", "number"] = "class"
    """What a label is: the name or number of a class, or a number to be predicted itself (regression)."""
    names: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers. Default: those found in the training data, sorted."""
    head_width: Count | None = None
    """Width of the dense layer of the head. Default: the model's (BERT); Cramming has 1024."""
    head_dropout: ShareBelowOne = 0.1
    """Dropout in the head."""
    pairs: bool | None = None
    """Whether each row has two texts, `text` and `pair`. Default: if `fields` names a pair or the first row has one."""
    validation: str | list[str] | None = None
    """Held-out rows, given like `source`. Without it, rows are held out of `source`."""
    validation_fraction: InnerShare = 0.05
    """Share of rows held out when `validation` is not given."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of fields where they are not `text`, `pair` and `label`: `{text: premise, pair: hypothesis}`."""
    overlong: Literal["error", "drop", "cut"] = "cut"
    """What becomes of texts longer than the model sees: an error, nothing, or their beginning (of two, the longer one
    is cut first). It is counted and said."""
    hub_config: str | None = None
    """Configuration name of a hub data set."""
    hub_split: str = "train"
    """Split of a hub data set, or of a saved one."""
    cache_dir: str | None = None
    """Where prepared rows are kept. Default: `$CRAMJAX_CACHE`, else `~/.cache/cramjax`."""
