"""The model as requests see it."""

from dataclasses import dataclass

from cramjax.data.examples.chat import ChatTemplate
from cramjax.language_model import LanguageModel
from cramjax.serve.constraints import Grammars


@dataclass(frozen=True)
class Served:
    """A model with its name, and what reads requests for it."""

    model: LanguageModel
    name: str
    template: ChatTemplate | None
    grammars: Grammars
    context: int
    vocab_size: int
    adapters: tuple[str, ...] = ()
    """Names of the adapters beside it."""
