"""A language model as one value and as a directory; import and export."""

from cramjax.language_model.conversation import template_of
from cramjax.language_model.directory import load_model, save_model
from cramjax.language_model.exchange import import_model
from cramjax.language_model.value import LanguageModel

__all__ = ["LanguageModel", "import_model", "load_model", "save_model", "template_of"]
