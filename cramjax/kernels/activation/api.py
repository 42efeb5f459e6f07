"""The public function. Every implementation keeps for the backward pass what it reads, and nothing else."""

from jaxtyping import Array, Float

from cramjax.config import GATED, Activation
from cramjax.kernels import rows
from cramjax.kernels.activation import pallas, reference, xla
from cramjax.kernels.choice import Implementation, choose, never


def _pallas_refusal(activation: Activation, h: Array) -> str | None:
    if activation not in GATED:
        return f"XLA reads and writes {activation} once"
    return rows.refusal(h, 1)


IMPLEMENTATIONS = (
    Implementation("pallas", pallas.activate, _pallas_refusal),
    Implementation("xla", xla.activate, never),
    Implementation("reference", reference.activate, never),
)


def activate(
    activation: Activation, h: Float[Array, "*batch up"], implementation: str | None = None
) -> Float[Array, "*batch mlp"]:
    """Apply a non-linearity in float32; what it reads is all that the backward pass keeps.

    Args:
        activation: which one. Gated ones read a gate in the first half of the last axis and what it lets through in
            the second (Shazeer 2020, "GLU Variants Improve Transformer").
        h: the projection before it, in the compute precision.
        implementation: one of `IMPLEMENTATIONS`, by name. Default: the first that can run.

    Raises:
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    return choose("activation", IMPLEMENTATIONS, implementation, activation, h).compute(activation, h)
