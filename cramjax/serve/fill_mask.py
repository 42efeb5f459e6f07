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
from cramjax.model import Model
from cramjax.training import Run

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


def fill_mask(run: Run, text: str, *, top: int = 5) -> Filling:
    """The likeliest tokens for every `[MASK]` of a text.

    Args:
        run: a loaded masked run.
        text: at most a training sequence long, with one or more `[MASK]`.
        top: candidates for each mask.

    Raises:
        RunError: the run is not masked.
        ConfigError: no mask in the text, a text that is too long, or `top` out of range.
    """
    tokenizer, limit = run.tokenizer, run.config.data.sequence_length
    if run.config.objective.kind != "masked" or tokenizer.mask_id is None:
        raise RunError(f"{run.path} is a causal model, which fills no masks: continue text with `generate`.")
    if not 1 <= top <= tokenizer.vocab_size:
        raise ConfigError(f"top must be between 1 and {tokenizer.vocab_size} (the vocabulary), got {top}.")
    parts = text.split(MASK)
    if len(parts) == 1:
        raise ConfigError(f"the text has no {MASK}, got {text!r}: put {MASK} where a token is to be guessed.")
    ids = [tokenizer.separator_id]
    for number, part in enumerate(parts):
        # A byte-level token carries the space before it, so the one before a mask belongs to the token to be guessed.
        last = number == len(parts) - 1
        ids += tokenizer.encode(part if last else part.rstrip(" "))
        ids += [] if last else [tokenizer.mask_id]
    ids.append(tokenizer.separator_id)
    if len(ids) > limit:
        raise ConfigError(
            f"the text is {len(ids) - 2} tokens long, and this model sees at most {limit - 2}: shorten it."
        )
    at = np.flatnonzero(np.array(ids) == tokenizer.mask_id)
    probability = np.asarray(_probabilities(run.model, run.params, jnp.array([ids]), jnp.asarray(at)))
    ranked = np.argsort(-probability, axis=-1)[:, :top]
    masks = tuple(
        tuple(Candidate(tokenizer.token(int(token)), float(row[token])) for token in best)
        for row, best in zip(probability, ranked, strict=True)
    )
    return Filling(text, masks)


@partial(jit, seconds=BRIEF, static_argnames="model")
def _probabilities(
    model: Model, params: PyTree, tokens: Int[Array, "1 seq"], at: Int[Array, " masks"]
) -> Float[Array, "masks vocab"]:
    hidden = model.hidden(params, tokens)[0, at]
    return jax.nn.softmax(model.logits(params, hidden), axis=-1)
