"""Fill the masks of a text with a masked model."""

import html
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cramjax.compiling import BRIEF, jit
from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel
from cramjax.model import Model
from cramjax.model.ragged import Ragged
from cramjax.serve.lengths import batches, costs_of, ragged_of
from cramjax.training.given import Given, language_model

MASK = "[MASK]"


@dataclass(frozen=True)
class Candidate:
    """One token for a mask."""

    text: str
    probability: float


@dataclass(frozen=True)
class Filling:
    """A text with masks, and the likeliest tokens for each of them, filled independently."""

    text: str
    masks: tuple[tuple[Candidate, ...], ...]
    """For each mask, in order of the text: candidates, likeliest first."""

    def __str__(self) -> str:
        lines = [self.text]
        for number, candidates in enumerate(self.masks, start=1):
            ranked = "  ".join(f"{candidate.text!r} {candidate.probability:.1%}" for candidate in candidates)
            lines.append(f"{MASK} {number}: {ranked}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def fill_mask(given: Given, text: str, *, top: int = 5) -> Filling:
    """The likeliest tokens for every `[MASK]` of a text.

    Args:
        given: a masked run or model, or the path of one.
        text: at most a context long, with one or more `[MASK]`.
        top: candidates for each mask.

    Raises:
        RunError: the model is not masked.
        ConfigError: no mask in the text, a text that is too long, or `top` out of range.
    """
    model = language_model(given)
    tokenizer, limit, mask_id = model.tokenizer, model.context, _mask_of(model)
    if not 1 <= top <= tokenizer.vocab_size:
        raise ConfigError(f"top must be between 1 and {tokenizer.vocab_size} (the vocabulary), got {top}.")
    parts = text.split(MASK)
    if len(parts) == 1:
        raise ConfigError(f"the text has no {MASK}, got {text!r}: put {MASK} where a token is to be guessed.")
    ids = tokenizer.opening()
    framing = len(ids) + 1
    for number, part in enumerate(parts):
        # A byte-level token carries the space before it, so the one before a mask belongs to the token to be guessed.
        last = number == len(parts) - 1
        ids += tokenizer.encode(part if last else part.rstrip(" "))
        ids += [] if last else [mask_id]
    ids.append(tokenizer.separator_id)
    if len(ids) > limit:
        raise ConfigError(
            f"the text is {len(ids) - framing} tokens long, and this model sees at most {limit - framing}: shorten it."
        )
    at = np.flatnonzero(np.array(ids) == mask_id)
    (batch,) = batches([len(ids)], costs_of(model))
    probability = np.asarray(_probabilities(model.model, model.params, ragged_of(batch, [ids]), jnp.asarray(at)))
    ranked = np.argsort(-probability, axis=-1)[:, :top]
    masks = tuple(
        tuple(Candidate(tokenizer.token(int(token)), float(row[token])) for token in best)
        for row, best in zip(probability, ranked, strict=True)
    )
    return Filling(text, masks)


def _mask_of(given: LanguageModel) -> int:
    """The mask token of a masked model."""
    given.require_tokens()
    if given.kind == "causal":
        raise RunError(f"{given.path} is a causal model, which fills no masks: continue text with `generate`.")
    if given.kind == "encoder":
        raise RunError(
            f"{given.path} is an encoder without a head, which fills no masks: import a model with its head."
        )
    if given.tokenizer.mask_id is None:
        raise RunError(f"{given.path} has a tokenizer without a mask token, so it fills no masks.")
    return given.tokenizer.mask_id


@partial(jit, seconds=BRIEF, static_argnames="model")
def _probabilities(model: Model, params: PyTree, text: Ragged, at: Int[Array, " masks"]) -> Float[Array, "masks vocab"]:
    hidden = model.head(params, model.unpadded(params, text)[at])
    return jax.nn.softmax(model.logits(params, hidden), axis=-1)
