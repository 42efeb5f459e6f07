"""The zig-zag walk: for each token, for each block, for each batch; weights of a block are read once for all batches.

While a batch is computed, the weights of the blocks to come, the next batch's cache and activations, and what the one
before leaves are on their way (`streams`).

Source: Sheng et al. 2023, arXiv:2303.06865, section 4.2 and algorithm 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from cramjax.serve.offload.caches import Activations, Caches
from cramjax.serve.offload.layout import Layout
from cramjax.serve.offload.programs import Programs, empty_text
from cramjax.serve.offload.weights import Coming, Weights

Choose = Callable[[int, int, Array], np.ndarray]
"""The next token of each row of a batch (its number), after so many tokens that were drawn, by its logits."""


@dataclass
class _Batch:
    """Rows that are computed together."""

    text: Any
    tokens: np.ndarray
    """New ones (rows, n)."""
    counts: np.ndarray
    """How many of them are each row's."""
    lengths: np.ndarray
    """Tokens in each row's cache before them."""
    going: np.ndarray
    """Rows that are not done."""
    context: Any = None


@dataclass(frozen=True)
class Walk:
    """All that a block of rows is walked with."""

    layout: Layout
    weights: Weights
    programs: Programs
    coming: Coming
    caches: Caches
    activations: Activations
    batch: int
    """Rows of a batch."""
    places: int
    """Most tokens of a row."""

    def run(
        self, prompts: Sequence[Sequence[int]], output: int, choose: Choose, ends: Sequence[int]
    ) -> list[list[int]]:
        """Continue rows, up to a token that ends a text or as many as are asked for.

        Args:
            prompts: token ids of each row, one at least.
            output: most tokens drawn for each.
            choose: draws.
            ends: tokens that end a text.

        Returns:
            The tokens drawn for each row.
        """
        batches = [self._begun(prompts[at : at + self.batch]) for at in range(0, len(prompts), self.batch)]
        drawn: list[list[int]] = [[] for _ in prompts]
        stages = range(len(self.layout.walked))
        self.coming.expect(stages)
        for step in range(output):
            if step + 1 < output:
                self.coming.expect(stages)
            active = [number for number, own in enumerate(batches) if own.going.any()]
            self._step(batches, active, step)
            self._draw(batches, active, step, choose, drawn, ends)
            if not any(own.going.any() for own in batches):
                break
        self.coming.forget()
        return drawn

    def _begun(self, prompts: Sequence[Sequence[int]]) -> _Batch:
        tokens = np.zeros((self.batch, min(width_of(max(map(len, prompts))), self.places)), np.int32)
        counts = np.zeros(self.batch, np.int32)
        for row, own in enumerate(prompts):
            tokens[row, : len(own)] = own
            counts[row] = len(own)
        text = empty_text(self.programs.model, self.batch, self.places)
        return _Batch(text, tokens, counts, np.zeros(self.batch, np.int32), counts > 0)

    def _step(self, batches: list[_Batch], active: list[int], step: int) -> None:
        """All new tokens through all blocks."""
        for number in active:
            own = batches[number]
            rows = self.weights.rows(own.tokens)
            x, own.context, own.text = self.programs.call(
                "embed", self.weights.embed, rows, own.text, own.tokens, own.counts
            )
            self.activations.put(number, x)
        through = self._prompts if step == 0 else self._tokens
        for block in range(len(self.layout.blocks)):
            params = self.coming.take()
            before: Any = ()
            for turn, number in enumerate(active):
                after = active[turn + 1] if turn + 1 < len(active) else None
                if after is not None:
                    self.activations.prefetch(after)
                x = through(params, block, number, batches[number])
                if step and after is not None:
                    self.caches.prefetch(block, after, batches[after].lengths)
                elif step and block + 1 < len(self.layout.blocks):
                    self.caches.prefetch(block + 1, active[0], batches[active[0]].lengths)
                self.activations.put(number, x)
                jax.block_until_ready(before)  # no more than two batches are on the device
                before = x
            jax.block_until_ready(before)
            del params, before
            self.coming.release()

    def _prompts(self, params: Any, block: int, number: int, own: _Batch) -> Array:
        stage, x = self.layout.blocks[block], self.activations.get(number)
        out, new = self.programs.call("prompt", params, x, own.context, np.int32(stage.repeat), place=stage.place)
        self.caches.fill(block, number, new)
        return out

    def _tokens(self, params: Any, block: int, number: int, own: _Batch) -> Array:
        stage, x = self.layout.blocks[block], self.activations.get(number)
        at, repeat = {"place": stage.place}, np.int32(stage.repeat)
        queries, new, places = self.programs.call("project", params, x, own.context, repeat, **at)
        real = own.counts > 0
        mixed = self.caches.attend(block, number, stage.place, queries, new, places, own.lengths, real)
        return self.programs.call("rest", params, x, own.context, repeat, mixed, **at)

    def _draw(
        self,
        batches: list[_Batch],
        active: list[int],
        step: int,
        choose: Choose,
        drawn: list[list[int]],
        ends: Sequence[int],
    ) -> None:
        """The head, and a token for each row that is not done."""
        params = self.coming.take()
        for number in active:
            own = batches[number]
            logits = self.programs.call("head", params, self.activations.get(number), own.counts)
            tokens = choose(number, step, logits)
            own.lengths = own.lengths + own.counts
            first = number * self.batch
            for place, row in enumerate(range(first, min(first + self.batch, len(drawn)))):
                if own.going[place]:
                    drawn[row].append(int(tokens[place]))
                    own.going[place] = tokens[place] not in ends
            own.tokens, own.counts = tokens[:, None].astype(np.int32), own.going.astype(np.int32)
        self.coming.release()


def width_of(tokens: int) -> int:
    """Tokens to which prompts are padded: so that there are few programs, and an eighth more at most."""
    step = max(8, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // step) * step
