"""From what a user gives to the tokens that a causal model continues: its prompts, what of its vocabulary may be drawn
after them, and how much room that takes.
"""

from collections.abc import Sequence

from cramjax.data import Tokenizer
from cramjax.errors import RunError
from cramjax.language_model import LanguageModel, template_of
from cramjax.training.given import Given, language_model

_LEAST_WINDOW = 128
"""Tokens; a longer context gets a cache as long as the prompt and what is to be drawn, in powers of two."""


def causal_model(given: Given) -> LanguageModel:
    """The model of a run, a model or the path of one.

    Raises:
        RunError: it does not continue text.
    """
    model = language_model(given)
    model.require_tokens()
    if model.kind == "masked":
        raise RunError(
            f"{model.path} is a masked model, which does not continue text: fill its masks with `fill-mask`."
        )
    if model.kind == "encoder":
        raise RunError(
            f"{model.path} is an encoder without a head, which does not continue text: `embed` makes vectors."
        )
    return model


def encoded_prompts(model: LanguageModel, texts: Sequence[str], *, chat: bool) -> tuple[list[int], list[list[int]]]:
    """Token ids of prompts as the model is to see them, and where the prompt's own begin in each.

    Args:
        model: a causal one.
        texts: the prompts.
        chat: whether they are what a user says; then the ids go up to where each answer begins.
    """
    if chat:
        template = template_of(model)
        return [0] * len(texts), [template.question([{"role": "user", "content": t}]).tolist() for t in texts]
    encoded = [model.tokenizer.encode(text) for text in texts]
    starts = [model.tokenizer.opening(ids) for ids in encoded]
    return [len(start) for start in starts], [[*start, *ids] for start, ids in zip(starts, encoded, strict=True)]


def never_drawn(tokenizer: Tokenizer, rows: int) -> tuple[int, ...]:
    """Special tokens that no text holds, so that a causal model has not learned to avoid them, and rows of the
    vocabulary that are no token.
    """
    special = {tokenizer.mask_id, tokenizer.pad_id} - {None, *tokenizer.ends}
    return tuple(sorted([*(token for token in special if token is not None), *range(tokenizer.vocab_size, rows)]))


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], drawn: Sequence[int]) -> str:
    """The text of the tokens drawn after a prompt's."""
    # Decoding the whole and taking the prompt off keeps the spaces that some tokenizers put between words.
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *drawn])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(drawn)


def window_of(context: int, tokens: int) -> int:
    """Tokens that a cache has room for: the context, or less where less will be needed."""
    return min(context, max(_LEAST_WINDOW, 1 << (tokens - 1).bit_length()))
