"""Caches whose streams are behind: what is attended to is what was put there."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.serve.offload.caches import FILLING, Caches
from cramjax.serve.offload.store import scratch
from cramjax.serve.offload.streams import InTurn

from .late import Late

PLACES, PROMPT, STEPS, BLOCKS, BATCHES = 6, 2, 3, 2, 3


class Recorded:
    """Programs of one row on the host and one on the disk, which note what they attend to."""

    cached = (slice(0, 0), slice(0, 1), slice(1, 2))

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def call(self, name: str, held: Any, query: Any, *_: Any, **__: Any) -> Any:
        assert name == "attend"
        self.seen.append(np.array(held["values"]).ravel())
        return query


def shapes(rows: int, places: int) -> Any:
    return {name: jax.ShapeDtypeStruct((rows, places, 1, 1), np.float32) for name in ("keys", "values")}


def of(value: float, tokens: int) -> Any:
    return {name: jnp.full((1, tokens, 1, 1), value, jnp.float32) for name in ("keys", "values")}


@pytest.mark.parametrize("loading", [Late, InTurn])
@pytest.mark.parametrize("storing", [Late, InTurn])
def test_rows_are_whole_however_late_they_are_stored_and_read(loading: Any, storing: Any, tmp_path: Path) -> None:
    load, store = loading(), storing()
    programs, host = Recorded(), jax.devices("cpu")[0]
    settings = {"blocks": BLOCKS, "batches": BATCHES, "places": PLACES, "host": host, "attend_on_host": True}
    query, place = jnp.zeros((1, 1, 1, 1)), jnp.zeros(1)
    with scratch(tmp_path) as made:
        caches = Caches(programs, shapes, scratch=made, load=load, store=store, **settings)  # pyright: ignore
        for block, batch in itertools.product(range(BLOCKS), range(BATCHES)):
            caches.fill(block, batch, [None, of(10 * block + batch + 1, PROMPT), of(-10 * block - batch - 1, PROMPT)])
        for step in range(STEPS):
            lengths = np.full(2, PROMPT + step, np.int32)
            for block, batch in itertools.product(range(BLOCKS), range(BATCHES)):
                new = [None, of(100 + step, 1), of(-100 - step, 1)]
                more = [None, query, query], new, [None, place, place], lengths, np.ones(2, bool)
                caches.attend(block, batch, 0, *more)  # pyright: ignore[reportArgumentType]
                if (batch := batch + 1) < BATCHES:
                    caches.prefetch(block, batch, lengths)
                elif block + 1 < BLOCKS:
                    caches.prefetch(block + 1, 0, lengths)
                for sign, found in zip((1, -1), programs.seen[-2:], strict=True):
                    prompt = [sign * (10 * block + batch)] * PROMPT
                    drawn = [sign * (100 + before) for before in range(step + 1)]
                    assert found[: PROMPT + step + 1].tolist() == prompt + drawn


def test_prompts_on_their_way_from_the_device_are_those_of_two_batches(tmp_path: Path) -> None:
    store = Late()
    settings = {"blocks": 1, "batches": 5, "places": PLACES, "host": None, "attend_on_host": True}
    with scratch(tmp_path) as made:
        caches = Caches(Recorded(), shapes, scratch=made, load=Late(), store=store, **settings)  # pyright: ignore
        waiting = []
        for batch in range(5):
            caches.fill(0, batch, [None, of(1, PROMPT), of(1, PROMPT)])
            waiting.append(len(store.waiting))
    assert waiting == [1, 2, 2, 2, 2] and FILLING == 2
