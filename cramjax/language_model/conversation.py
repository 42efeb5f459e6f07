"""A model's chat template, for all who ask it as it was tuned to be asked."""

from cramjax.data.examples import ChatTemplate, PieceEncoder, chat_template
from cramjax.errors import RunError
from cramjax.language_model.value import LanguageModel


def template_of(model: LanguageModel) -> ChatTemplate:
    """The chat template of a model, compiled; examples to tune on are rendered by the same.

    Raises:
        RunError: it has none.
        DataError: what it has is no Jinja template.
    """
    if model.chat_template is None:
        raise RunError(f"{model.path} has no chat template: leave chat out, or give a model that was tuned to chat.")
    return chat_template(model.chat_template, PieceEncoder(model.tokenizer))
