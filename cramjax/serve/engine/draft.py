"""Whether a smaller model can guess tokens for another one, and how it is loaded."""

from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.model.stack import virtual_tokens
from cramjax.serve.decoding import for_decoding
from cramjax.serve.prompts import causal_model
from cramjax.serving import EngineConfig
from cramjax.training.given import Given


def draft_model(given: Given | None, weights: str) -> LanguageModel | None:
    """The draft model, if there is one, as it is held for decoding.

    Args:
        given: a causal run or model, or the path of one.
        weights: as of `for_decoding`.

    Raises:
        RunError: it is not causal.
    """
    return None if given is None else for_decoding(causal_model(given), weights)


def check_draft(model: LanguageModel, draft: LanguageModel, config: EngineConfig, context: int) -> None:
    """Refuse a draft model that cannot guess for a model.

    Args:
        model: that verifies the guesses.
        draft: that makes them.
        config: of the engine.
        context: tokens of a request.

    Raises:
        ConfigError: another tokenizer, fewer tokens seen, virtual tokens, or guesses by look-up as well.
    """
    if config.lookup:
        raise ConfigError(f"guesses come from lookup or from draft: give one of them, got lookup={config.lookup} too.")
    words, own = (each.tokenizer.backend.get_vocab() for each in (draft, model))
    if words != own:
        differ = len(words.items() ^ own.items())
        raise ConfigError(
            f"the draft {draft.path} must have the tokenizer of {model.path}, and {differ} words of their "
            "vocabularies differ."
        )
    if draft.context < context:
        raise ConfigError(
            f"the draft {draft.path} sees {draft.context} tokens, and requests have up to {context}: give "
            f"engine.context={draft.context} or less."
        )
    for each in (model, draft):
        if count := virtual_tokens(each.params):
            raise ConfigError(f"{each.path} has {count} virtual tokens, with which there is no speculation.")
