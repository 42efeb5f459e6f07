"""What a model is tuned on, as a configuration. Imports no jax."""

from dataclasses import dataclass, field
from typing import Literal

from cramjax.ranges import InnerShare

Format = Literal["chat", "completion", "text"]

FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "labels": ("text", "pair", "label"),
}
"""What each format reads of a row."""


@dataclass(frozen=True)
class ExamplesConfig:
    """Where examples come from, and what of them is to be predicted."""

    source: str | list[str]
    """JSONL, JSON, CSV, TSV or Parquet files (also .gz, .bz2, .xz, .zst), globs of them, a directory saved by Hugging
    Face `datasets`, or `hub:NAME`."""
    format: Format = "chat"
    """`chat`: conversations, as `messages: [{role, content}]` or `conversations: [{from, value}]`; what the assistant
    says is predicted, and the token that ends its turn. `completion`: `prompt` and `completion`, of which the second
    is predicted. `text`: all of it is."""
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
