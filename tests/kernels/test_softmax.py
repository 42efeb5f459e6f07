"""The loss of rows of logits and its gradient against the definition in float64: every implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.kernels.cross_entropy.softmax import SoftmaxRule, row_losses, softmax_loss

_IMPLEMENTATIONS = ("pallas", "xla")


def _defined(rule: SoftmaxRule, logits: np.ndarray, bias: Any, targets: np.ndarray, weights: np.ndarray) -> Any:
    """Negative log-likelihood, log-partition, whether the target is the greatest and of how many, and the gradient."""
    raw = logits if bias is None else logits + bias
    squashed = raw if rule.softcap is None else rule.softcap * np.tanh(raw / rule.softcap)
    real = np.arange(logits.shape[1]) < rule.vocab_size
    greatest = squashed[:, real].max(1, keepdims=True)
    powers = np.where(real, np.exp(squashed - greatest, where=real, out=np.zeros_like(squashed)), 0.0)
    z = (greatest + np.log(powers.sum(1, keepdims=True)))[:, 0]
    rows = np.arange(len(targets))
    gradient = powers / powers.sum(1, keepdims=True) * (1 + 2 * rule.z_loss * z)[:, None]
    gradient[rows, targets] -= 1
    gradient *= weights[:, None]
    if rule.softcap is not None:
        gradient *= 1 - np.tanh(raw / rule.softcap) ** 2
    right = squashed[rows, targets] >= greatest[:, 0]
    return z - squashed[rows, targets], z, right, (real & (squashed == greatest)).sum(1), gradient


_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "z-loss": {"z_loss": 0.3},
    "padded": {"padding": 4},
    "all": {"bias": True, "softcap": 3.0, "z_loss": 0.1, "padding": 7},
    "wide": {"vocab": 5000, "bias": True, "softcap": 30.0, "z_loss": 1e-4, "padding": 3},
    "large": {"size": 1e4},
    "large under a soft-cap": {"size": 1e4, "softcap": 15.0},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _OPTIONS)
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_losses_and_gradients_match_float64(implementation: str, name: str, dtype: str) -> None:
    options = {"vocab": 33, "bias": False, "softcap": None, "z_loss": 0.0, "padding": 0, "size": 2.0, **_OPTIONS[name]}
    rng, vocab = np.random.default_rng(0), options["vocab"]
    rule = SoftmaxRule(options["softcap"], options["z_loss"], vocab - options["padding"])
    logits = np.asarray(jnp.asarray(options["size"] * rng.normal(size=(5, vocab)), dtype), np.float64)
    logits[:, rule.vocab_size :] = 50.0  # padding, which must not count
    bias = rng.normal(size=vocab).astype(np.float32) if options["bias"] else None
    targets = np.array([0, rule.vocab_size - 1, 17, rule.vocab_size - 1, 3], np.int32)  # of a wide row's last part too
    weights = np.array([1.0, 0.25, 0.0, 2.0, 1.0], np.float32)

    @jax.jit
    def run(logits: jax.Array, bias: Any, targets: jax.Array, weights: jax.Array) -> Any:
        losses, gradient = softmax_loss(rule, logits, bias, targets, weights, implementation)
        return losses, gradient, logits  # read again: the gradient must not lie where they lie

    given = jnp.asarray(logits, dtype)
    arguments = None if bias is None else jnp.asarray(bias), jnp.asarray(targets), jnp.asarray(weights)
    losses, gradient, after = run(given, *arguments)
    assert (after == given).all() and gradient.dtype == dtype and losses.nll.dtype == jnp.float32
    plain = row_losses(rule, given, arguments[0], arguments[1])
    nll, z, correct, greatest, wanted = _defined(rule, logits, bias, targets, weights.astype(np.float64))
    # float32 rounds a logit by 2^-24 of its size, and a sum of powers by a few of those.
    size = min(np.abs(logits).max(), options["softcap"] or np.inf) + 5
    near = 2.0**-21 * size
    # Of logits that were rounded, several may be the greatest: each is right by its share.
    shares = correct if dtype == "float32" else correct / greatest
    for own, right in ((losses, shares), (plain, correct)):
        np.testing.assert_allclose(own.nll, nll, rtol=0, atol=2 * near)
        np.testing.assert_allclose(own.log_partition, z, rtol=0, atol=near)
        np.testing.assert_array_equal(own.correct, right.astype(np.float32))
    rounding = 0 if dtype == "float32" else 2**-8
    share = weights[:, None] * (1 + 2 * rule.z_loss * np.abs(z)[:, None])
    error = np.abs(np.asarray(gradient, np.float64) - wanted)
    assert (error <= rounding * np.abs(wanted) + 2 * near * share).all()
    assert (np.asarray(gradient)[:, rule.vocab_size :] == 0).all() and (np.asarray(gradient)[2] == 0).all()


@pytest.mark.parametrize(("dtype", "correct"), [("float32", [1, 1, 0]), ("bfloat16", [0.5, 0.5, 0])])
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_a_target_that_ties_is_right_or_right_by_its_share(
    implementation: str, dtype: str, correct: list[float]
) -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0], [3.0, 1.0, 3.0], [3.0, 1.0, 2.0]], dtype)
    targets = jnp.array([1, 2, 2], jnp.int32)
    losses, _ = softmax_loss(SoftmaxRule(None, 0.0, 3), logits, None, targets, jnp.ones(3), implementation)
    assert losses.correct.tolist() == correct


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_a_target_among_the_padding_has_no_probability(implementation: str) -> None:
    targets = jnp.array([6, 2], jnp.int32)
    losses, gradient = softmax_loss(
        SoftmaxRule(None, 0.0, 5), jnp.ones((2, 8)), None, targets, jnp.array([0.0, 1.0]), implementation
    )
    assert losses.nll[0] == jnp.inf and losses.correct[0] == 0 and (gradient[0] == 0).all()
    assert losses.nll[1] == pytest.approx(np.log(5), abs=1e-6)


def test_without_a_gpu_the_kernel_says_so() -> None:
    with pytest.raises(ConfigError, match="Softmax implementation 'pallas' cannot run here: .*this is a cpu"):
        targets = jnp.zeros(2, jnp.int32)
        softmax_loss(SoftmaxRule(None, 0.0, 8), jnp.zeros((2, 8)), None, targets, jnp.ones(2), "pallas")
