"""The model as requests see it."""

from dataclasses import dataclass
from typing import Literal

from cramjax.data.examples.chat import ChatTemplate
from cramjax.language_model import LanguageModel
from cramjax.serve.constraints import Grammars
from cramjax.serve.embedder import is_embedder
from cramjax.serve.http.calls import CallForm
from cramjax.serve.http.fields import RequestError, short


@dataclass(frozen=True)
class Served:
    """A model with its name, and what reads requests for it."""

    model: LanguageModel
    name: str
    template: ChatTemplate | None
    calls: CallForm | None
    """How it writes calls of tools; None: it calls none."""
    grammars: Grammars
    context: int
    vocab_size: int
    adapters: tuple[str, ...] = ()
    """Names of the adapters beside it."""

    @property
    def makes(self) -> Literal["text", "embeddings"]:
        """What it is served for."""
        return "embeddings" if is_embedder(self.model) else "text"

    def require_name(self, name: str | None) -> str | None:
        """The adapter that a body names; None: the model itself.

        Raises:
            RequestError: there is no model of this name.
        """
        if name is None or name == self.name:
            return None
        if name not in self.adapters:
            known = ", ".join(map(short, (self.name, *self.adapters)))
            raise RequestError(
                f"there is no model {short(name)} here. There is {known}.", "model", 404, "model_not_found"
            )
        return name
