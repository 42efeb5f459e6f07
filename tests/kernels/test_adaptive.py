"""The adaptive softmax is a distribution, its loss is that distribution's, and room in the tails changes speed only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.cross_entropy import Tail, adaptive_cross_entropy_sum, adaptive_logits

EMBED, SHORT, SIZES, VOCAB = 16, 20, (24, 32), 70  # the last 6 tokens are padding


@pytest.fixture(scope="module")
def head() -> tuple[jax.Array, list[Tail]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    tails = [Tail(normal(EMBED, narrow), normal(narrow, size)) for narrow, size in zip((8, 4), SIZES, strict=True)]
    return normal(EMBED, SHORT + 2), tails


def reference_log_probabilities(hidden: np.ndarray, weight: jax.Array, tails: list[Tail]) -> np.ndarray:
    """p(cluster) · p(token | cluster) in float64, from the definition."""

    def softmax(logits: np.ndarray) -> np.ndarray:
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    hidden = hidden.astype(np.float64)
    first = softmax(hidden @ np.asarray(weight, np.float64))
    parts = [first[:, :SHORT]]
    for index, tail in enumerate(tails):
        y = hidden @ np.asarray(tail.down, np.float64)
        y /= np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
        own = y @ np.asarray(tail.weight, np.float64)
        if index == 1:
            own = own[:, : VOCAB - SHORT - SIZES[0]]
        parts.append(first[:, SHORT + index, None] * softmax(own))
    return np.log(np.concatenate(parts, -1))


# Few rare tokens fit the tails' room; many do not, and take the other branch.
TARGETS = {"few rare": [0, 5, 19, 21, 3, 60, 7, 2, 1, 43, 8, 9, 11, 12, 0, 1], "many rare": [*range(40, 56)]}


@pytest.mark.slow
@pytest.mark.parametrize("case", TARGETS)
def test_loss_and_gradients_are_those_of_the_definition(head: tuple[jax.Array, list[Tail]], case: str) -> None:
    weight, tails = head
    targets = jnp.asarray(TARGETS[case])
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(16, EMBED)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=16), jnp.float32).at[3].set(0.0)
    sums = adaptive_cross_entropy_sum(hidden, weight, targets, weights, tails=tails, vocab_size=VOCAB)
    expected = reference_log_probabilities(np.asarray(hidden), weight, tails)
    nll = -expected[np.arange(16), np.asarray(targets)]
    np.testing.assert_allclose(float(sums.nll), float(nll @ np.asarray(weights, np.float64)), rtol=2e-6)

    def by_logits(hidden: jax.Array, weight: jax.Array, tails: list[Tail]) -> jax.Array:
        logits = adaptive_logits(hidden, weight, tails=tails, vocab_size=VOCAB)
        return -jnp.sum(jnp.take_along_axis(logits, targets[:, None], 1)[:, 0] * weights)

    def by_sums(hidden: jax.Array, weight: jax.Array, tails: list[Tail]) -> jax.Array:
        return adaptive_cross_entropy_sum(hidden, weight, targets, weights, tails=tails, vocab_size=VOCAB).total

    got = jax.grad(by_sums, argnums=(0, 1, 2))(hidden, weight, tails)
    wanted = jax.grad(by_logits, argnums=(0, 1, 2))(hidden, weight, tails)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_logits_are_log_probabilities_of_the_whole_vocabulary(head: tuple[jax.Array, list[Tail]]) -> None:
    weight, tails = head
    hidden = np.random.default_rng(2).normal(size=(5, EMBED)).astype(np.float32)
    logits = np.asarray(adaptive_logits(jnp.asarray(hidden), weight, tails=tails, vocab_size=VOCAB))[:, :VOCAB]
    np.testing.assert_allclose(np.exp(logits.astype(np.float64)).sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(logits, reference_log_probabilities(hidden, weight, tails), atol=1e-5)


def test_correct_counts_the_likeliest_cluster_and_place(head: tuple[jax.Array, list[Tail]]) -> None:
    weight, tails = head
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(64, EMBED)), jnp.float32)
    likeliest = np.argmax(reference_log_probabilities(np.asarray(hidden), weight, tails), -1)
    short = likeliest < SHORT
    sums = adaptive_cross_entropy_sum(hidden, weight, jnp.asarray(likeliest), tails=tails, vocab_size=VOCAB)
    assert short.sum() <= float(sums.correct) <= 64
