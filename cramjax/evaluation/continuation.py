"""The likeliest continuations of many prompts, batch by batch, up to texts that stop them."""

from collections.abc import Sequence

from cramjax.errors import ConfigError
from cramjax.evaluation.likelihood import Progress, Tokens, require_causal
from cramjax.language_model import LanguageModel
from cramjax.serve.generate import continue_rows
from cramjax.serve.prompts import text_after
from cramjax.serve.sampling import Sampling

_BATCH_TOKENS = 1 << 15
"""Most tokens that the caches of a batch of several rows hold."""
_MOST_ROWS = 64


def continuations(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt until the model ends the text, or writes one of the texts that stop it.

    A prompt that leaves no room for what is to be written loses its start, but not what stands before every text.

    Args:
        model: a causal one.
        prompts: ids, at least one each.
        max_tokens: most tokens of a continuation.
        stop: texts that end a continuation; they are not part of it.
        sampling: how tokens are drawn. Default: the likeliest.
        seed: of the draws.
        progress: is told of each batch.

    Raises:
        RunError: the model is not causal.
        ConfigError: `max_tokens` leaves no room for a prompt.
    """
    require_causal(model)
    if not 1 <= max_tokens < model.context:
        raise ConfigError(
            f"max_tokens must be from 1 to {model.context - 1}, for {model.path} sees {model.context} tokens; got "
            f"{max_tokens}."
        )
    rows = [cut(model, prompt, max_tokens) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    longest = max(map(len, rows), default=0) + max_tokens
    size = max(1, min(_MOST_ROWS, _BATCH_TOKENS // longest))
    texts = [""] * len(rows)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch, ends = [list(rows[number]) for number in numbers], [len(rows[number]) for number in numbers]

        def written(place: int, batch: list[list[int]] = batch, ends: list[int] = ends) -> str:
            drawn = batch[place][ends[place] :]
            drawn = drawn[:-1] if drawn and drawn[-1] in model.tokenizer.ends else drawn
            return text_after(model.tokenizer, batch[place][: ends[place]], drawn)

        continue_rows(
            model,
            batch,
            max_tokens,
            sampling or Sampling(temperature=0.0),
            seed + start,
            finished=lambda place, written=written: stopped(written(place), stop) is not None,
        )
        for place, number in enumerate(numbers):
            text = written(place)
            end = stopped(text, stop)
            texts[number] = text if end is None else text[:end]
        if progress is not None:
            progress(start + len(numbers), len(rows))
    return texts


def stopped(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the texts that stop it begins; None: there is none."""
    return min((found for end in stop if (found := text.find(end)) >= 0), default=None)


def cut(model: LanguageModel, prompt: Tokens, max_tokens: int) -> Tokens:
    """A prompt without as much of its start as makes room for so many tokens more."""
    room = model.context - max_tokens
    if len(prompt) <= room:
        return prompt
    begin = [*model.tokenizer.begin_ids] if model.tokenizer.begin_ids else []
    kept = begin if list(prompt[: len(begin)]) == begin and len(begin) < room else []
    return [*kept, *prompt[len(prompt) - room + len(kept) :]]
