"""What training on preferences minimises: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

The reference is the base of the adapter that is trained: the same weights, read once more without it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.kernels.packed import without_adapters
from cramjax.model.model import Model
from cramjax.model.objectives import Loss, Objective, examples_task


@dataclass(frozen=True)
class Preferences(Objective):
    """The loss of pairs of answers; the sums of its `Loss` are over pairs, of which `correct` are ranked right."""

    beta: float = 0.1

    def __call__(self, params: PyTree, tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Loss:
        """The loss of a batch; the examples of each row are chosen and rejected answers in turn."""
        del fraction
        own = answer_logs(self.model, params, tokens, rng if train else None)
        reference = jax.lax.stop_gradient(answer_logs(self.model, without_adapters(params), tokens, None))
        return preference_loss(own, reference, are_pairs(tokens), self.beta)


def answer_logs(
    model: Model, params: PyTree, rows: Int[Array, "batch 3 tokens"], rng: Array | None
) -> Float[Array, "batch examples"]:
    """The log-probability of what is to be predicted of each example of each row, in nats, by its number from 1.

    Args:
        model: a causal model.
        params: all its parameters.
        rows: as of `examples_task`.
        rng: key for dropout; None: none.
    """
    task = examples_task(rows, rng)
    assert task.weights is not None
    hidden, shape = model.head(params, model.stream(params, **task.seen)), task.tokens.shape

    @jax.checkpoint
    def logs(item: tuple[Array, Array, Array]) -> Array:
        states, targets, weights = item
        logits = model.logits(params, states)
        own = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return weights * (own - jax.nn.logsumexp(logits, axis=-1))

    # The logits of one row exist at a time.
    each = jax.lax.map(logs, (hidden, task.targets.reshape(shape), task.weights.reshape(shape)))
    return _by_example(each, rows)


def are_pairs(rows: Int[Array, "batch 3 tokens"]) -> Bool[Array, "batch pairs"]:
    """Which pairs of numbers stand for a pair of answers; arguments as of `answer_logs`."""
    weights = examples_task(rows).weights
    assert weights is not None
    counts = _by_example(weights.reshape(len(rows), -1), rows)
    return (counts[:, 0::2] > 0) & (counts[:, 1::2] > 0)


def preference_loss(
    own: Float[Array, "batch examples"],
    reference: Float[Array, "batch examples"],
    there: Bool[Array, "batch pairs"],
    beta: float,
) -> Loss:
    """−log σ(β · ((log π − log π₀)(chosen) − (log π − log π₀)(rejected))), summed over pairs (equation 7).

    Args:
        own: log-probabilities, of chosen and rejected answers in turn.
        reference: the same under the reference.
        there: which pairs there are.
        beta: how much moving away from the reference costs.
    """
    gained = own - reference
    margins = beta * (gained[:, 0::2] - gained[:, 1::2])
    total = jnp.sum(jnp.where(there, jax.nn.softplus(-margins), 0.0))
    pairs, right = (jnp.sum(each, dtype=jnp.float32) for each in (there, there & (margins > 0)))
    return Loss(total, total, jnp.zeros((), jnp.float32), pairs, right)


def _by_example(each: Float[Array, "batch seq"], rows: Int[Array, "batch 3 tokens"]) -> Float[Array, "batch examples"]:
    """Sums over the predictions of each example of a row, of as many examples, an even number, as could be there."""
    tokens = rows.shape[2]
    most = tokens + tokens % 2

    def sums(values: Array, numbers: Array) -> Array:
        return jax.ops.segment_sum(values, numbers, num_segments=most + 1)[1:]

    return jax.vmap(sums)(each, rows[:, 1, 1:])
