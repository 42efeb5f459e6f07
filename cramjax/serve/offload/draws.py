"""How the rows of a batch draw their next tokens, as the engine draws them: a program of its own."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cramjax.serve.engine.draw import History, draw, ways
from cramjax.serve.request import SamplingParameters

Draw = Callable[[int, Array], np.ndarray]
"""The next token of each row of a batch, after so many tokens that were drawn, by its logits."""


def drawing(batch: int, vocabulary: int, banned: Sequence[int]) -> Callable[[Sequence[SamplingParameters]], Draw]:
    """A function that makes the draws of a batch, given how each of its rows draws; all share one program.

    Args:
        batch: rows; of fewer, the rest draws as it will.
        vocabulary: tokens.
        banned: tokens never drawn.
    """
    history, slots = History.empty(batch, vocabulary), jnp.arange(batch)
    never = np.array(banned, np.int32)
    program = jax.jit(
        lambda logits, own, numbers: draw(logits.at[:, never].set(-jnp.inf), own, history, slots, numbers)
    )

    def draws(each: Sequence[SamplingParameters]) -> Draw:
        return partial(_drawn, program, ways(list(each), batch), batch)

    return draws


def _drawn(program: Callable[..., Array], own: object, batch: int, step: int, logits: Array) -> np.ndarray:
    return np.asarray(program(logits, own, np.full(batch, step, np.int32)))
