"""Held-out evaluation inside a run: every token predicted once, summed in float64, reported per byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.compiling import jit
from cramjax.data import TokenFile
from cramjax.data.examples import ExampleFile, LabelledFile
from cramjax.model.objectives import Loss
from cramjax.training.step import LossFunction

_File = TypeVar("_File", ExampleFile, LabelledFile)


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out text."""

    loss: float
    """Mean negative log-likelihood per predicted token, in nats."""
    bits_per_byte: float
    """The same per UTF-8 byte of text, in bits. Masked models: as if every token had been predicted at the masked
    loss."""
    perplexity: float
    """exp(loss)."""
    accuracy: float
    """Share of predicted tokens that the model ranks first."""
    tokens: int
    """Tokens predicted."""
    bytes: float
    """Bytes of text those tokens stand for."""

    @property
    def score(self) -> float:
        """What checkpoints are judged by: less is better."""
        return self.bits_per_byte

    def scores(self) -> dict[str, float]:
        """The scores by the names that a run's log has for them."""
        names = ("loss", "bits_per_byte", "perplexity", "accuracy")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return (
            f"{self.bits_per_byte:.4f} bits per byte (loss {self.loss:.4f} nats per token, perplexity "
            f"{self.perplexity:,.2f}, accuracy {self.accuracy:.1%}; {self.tokens:,} tokens, {self.bytes:,.0f} bytes)"
        )

    def _repr_html_(self) -> str:
        return f"<b>{self.bits_per_byte:.4f}</b>{str(self)[6:]}"


@dataclass(frozen=True)
class LabelEvaluation:
    """Scores on held-out labelled texts."""

    loss: float
    """Mean negative log-likelihood of the right class in nats, or mean squared error of numbers."""
    accuracy: float | None
    """Share of texts whose likeliest class is the right one; None for numbers."""
    texts: int

    @property
    def score(self) -> float:
        """What checkpoints are judged by: less is better."""
        return self.loss

    def scores(self) -> dict[str, float]:
        """The scores by the names that a run's log has for them."""
        return {"loss": self.loss} | ({} if self.accuracy is None else {"accuracy": self.accuracy})

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"mean squared error {self.loss:.4f} ({self.texts:,} texts)"
        return f"accuracy {self.accuracy:.1%} (loss {self.loss:.4f} nats per text; {self.texts:,} texts)"


@dataclass(frozen=True)
class PairEvaluation:
    """Scores on held-out pairs of answers, of which one is preferred: of no text, so there are no bits per byte."""

    loss: float
    """Mean of the preference loss (DPO's), in nats per pair."""
    accuracy: float
    """Share of pairs whose preferred answer has gained more on the model as it was before."""
    pairs: int

    @property
    def score(self) -> float:
        """What checkpoints are judged by: less is better."""
        return self.loss

    def scores(self) -> dict[str, float]:
        """The scores by the names that a run's log has for them."""
        return {"loss": self.loss, "accuracy": self.accuracy}

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.1%} (loss {self.loss:.4f} nats per pair; {self.pairs:,} pairs)"


class HeldOut:
    """Scores parameters on the sequences of a token file; compiles once per process.

    Sequences follow one another without overlap, each with the training length, so every token but those of the first
    separator is predicted exactly once (causal), with the context its own sequence gives.

    Args:
        loss_function: the run's objective.
        file: the held-out tokens.
        sequence_length: tokens per sequence.
        causal: whether each sequence also needs the token after it.
        batch: sequences per batch, a multiple of the devices that share it.
        put: places a host batch on the devices.
        seconds: of the run, which say how much time compiling may take; None: much.
        begin: the token that every sequence is seen to begin with, in the place of the one before it; causal models of
            others give nothing sensible without. None: the one before it.
    """

    def __init__(
        self,
        loss_function: LossFunction,
        file: TokenFile,
        sequence_length: int,
        *,
        causal: bool,
        batch: int,
        put: Callable[[np.ndarray], Any] = jnp.asarray,
        seconds: float | None = None,
        begin: int | None = None,
    ):
        self._tokens = file.tokens
        self._sequences = max(1, math.ceil((len(file.tokens) - int(causal)) / sequence_length))
        self._bytes_per_token = file.text_bytes / max(1, len(file.tokens) - 1)
        self._causal, self._length, self._batch, self._put = causal, sequence_length, batch, put
        self._begin = begin if causal else None

        def sums(params: PyTree, tokens: jax.Array, numbers: jax.Array) -> Loss:
            # Each sequence has a key of its own: the same masks at every evaluation, whatever is in its batch.
            keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(numbers)
            return loss_function(params, tokens, keys, jnp.float32(1.0), False)

        self._sums = jit(sums, seconds=seconds)

    def evaluate(self, params: PyTree, max_tokens: int | None = None) -> Evaluation:
        """Score all held-out tokens, or sequences of about `max_tokens` of them, evenly spaced and always the same."""
        sequences = _spaced(self._sequences, self._length, max_tokens)
        sums, seen = [], 0
        for start in range(0, len(sequences), self._batch):
            numbers = sequences[start : start + self._batch]
            rows = self._rows(numbers)
            seen += int((rows >= 0).sum())
            padded = np.pad(numbers, (0, self._batch - len(numbers))).astype(np.int32)
            sums.append(self._sums(params, self._put(rows), padded))
        total = _total(sums)
        stands_for = total.tokens if self._causal else seen
        return _evaluation(total, stands_for, stands_for * self._bytes_per_token)

    def _rows(self, sequences: np.ndarray) -> np.ndarray:
        """Sequences as int32 (batch, length or length + 1); -1 stands for tokens that are not there."""
        extra = int(self._causal)
        rows = np.full((self._batch, self._length + extra), -1, np.int32)
        for row, index in zip(rows, sequences, strict=False):
            found = self._tokens[index * self._length : (index + 1) * self._length + extra]
            row[: len(found)] = found
            if self._begin is not None:
                row[0] = self._begin
        return rows


class _Rows(Generic[_File]):
    """Sums of an objective over rows of a file; compiled once per process.

    Args:
        loss_function: the objective of the rows.
        file: the held-out rows.
        batch: rows per batch, a multiple of the devices that share it.
        put: places a host batch on the devices.
        seconds: of the run, which say how much time compiling may take; None: much.
    """

    def __init__(
        self,
        loss_function: LossFunction,
        file: _File,
        *,
        batch: int,
        put: Callable[[np.ndarray], Any] = jnp.asarray,
        seconds: float | None = None,
    ):
        self._file, self._batch, self._put = file, batch, put
        self._sums = jit(
            lambda params, rows: loss_function(params, rows, None, jnp.float32(1.0), False), seconds=seconds
        )


class _ExampleRows(_Rows[ExampleFile]):
    """Sums over rows of examples."""

    def _numbers(self, max_tokens: int | None) -> np.ndarray:
        """Of the rows that are read."""
        return _spaced(len(self._file), self._file.length, max_tokens)

    def _totals(self, params: PyTree, numbers: np.ndarray) -> "_Total":
        sums = []
        for start in range(0, len(numbers), self._batch):
            rows = np.zeros((self._batch, 3, self._file.length + 1), np.int32)  # padding, which predicts nothing
            for row, number in zip(rows, numbers[start : start + self._batch], strict=False):
                row[:] = self._file.row(int(number))
            sums.append(self._sums(params, self._put(rows)))
        return _total(sums)


class HeldOutRows(_ExampleRows):
    """Scores parameters on rows of examples; made as `_Rows` is.

    Every token that is to be predicted is predicted once, from those of its own example. Bytes are those of the text
    that these tokens stand for.
    """

    def evaluate(self, params: PyTree, max_tokens: int | None = None) -> Evaluation:
        """Score all held-out rows, or those of about `max_tokens` tokens, evenly spaced and always the same."""
        numbers = self._numbers(max_tokens)
        total = self._totals(params, numbers)
        members = np.concatenate([self._file.members(int(number)) for number in numbers])
        return _evaluation(total, total.tokens, float(self._file.store.text_bytes[members].sum()))


class HeldOutPairs(_ExampleRows):
    """Scores parameters on rows of pairs of answers, by the objective of preferences; made as `_Rows` is."""

    def evaluate(self, params: PyTree, max_tokens: int | None = None) -> PairEvaluation:
        """Score all held-out rows, or those of about `max_tokens` tokens, evenly spaced and always the same."""
        total = self._totals(params, self._numbers(max_tokens))
        return PairEvaluation(total.nll / total.tokens, total.correct / total.tokens, int(total.tokens))


class HeldOutLabels(_Rows[LabelledFile]):
    """Scores parameters on labelled rows; made as `_Rows` is."""

    def evaluate(self, params: PyTree, max_tokens: int | None = None) -> LabelEvaluation:
        """Score all held-out rows, or those of about `max_tokens` tokens, evenly spaced and always the same."""
        numbers = _spaced(len(self._file), self._file.length, max_tokens)
        sums = [self._sums(params, self._put(rows)) for rows in self._file.batches(numbers, self._batch)]
        total = _total(sums)
        right = total.correct / total.tokens if self._file.classes else None
        return LabelEvaluation(total.nll / total.tokens, right, int(total.tokens))


class _Total(NamedTuple):
    """Sums over all batches, in float64."""

    nll: float
    tokens: float
    correct: float


def _total(sums: list[Loss]) -> _Total:
    return _Total(*np.sum([[np.float64(x) for x in (s.nll, s.tokens, s.correct)] for s in sums], axis=0).tolist())


def _evaluation(total: _Total, stands_for: float, text_bytes: float) -> Evaluation:
    """Scores of predictions that stand for so many tokens, and for so many bytes of text."""
    loss = total.nll / total.tokens
    return Evaluation(
        loss=loss,
        bits_per_byte=loss * stands_for / math.log(2) / text_bytes if text_bytes else math.inf,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=total.correct / total.tokens,
        tokens=int(total.tokens),
        bytes=text_bytes,
    )


def _spaced(count: int, length: int, max_tokens: int | None) -> np.ndarray:
    """Numbers of the sequences that are read: all, or evenly spaced ones of about `max_tokens` tokens together."""
    chosen = count if max_tokens is None else min(count, max(1, max_tokens // length))
    return np.arange(chosen) * count // chosen
