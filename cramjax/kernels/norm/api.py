"""The public norms. All of them compute in float32 inside, and keep their input for the backward pass."""

from jaxtyping import Array, Float

from cramjax.kernels import rows
from cramjax.kernels.choice import Implementation, choose, never
from cramjax.kernels.norm import pallas, reference, xla
from cramjax.kernels.norm.rule import Rule


def _pallas_refusal(x: Array) -> str | None:
    return rows.refusal(x, x.shape[-1])


IMPLEMENTATIONS = (
    Implementation("pallas", pallas.normalise_beside, _pallas_refusal),
    Implementation("xla", xla.normalise_beside, never),
    Implementation("reference", reference.normalise_beside, never),
)


def normalise(
    x: Float[Array, "*batch embed"],
    weight: Float[Array, " embed"] | None = None,
    bias: Float[Array, " embed"] | None = None,
    *,
    centred: bool,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "*batch embed"]:
    """Scale the last axis to a root mean square of 1; the result has the precision of `x`.

    Args:
        x: what to normalise (..., embed).
        weight: multiplies the result (embed,).
        bias: added to the result (embed,).
        centred: subtract the mean first (LayerNorm, Ba et al. 2016), or do not (RMSNorm, Zhang & Sennrich 2019).
        eps: added to the mean square.
        implementation: one of `IMPLEMENTATIONS`, by name. Default: the first that can run.

    Raises:
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    chosen = choose("norm", IMPLEMENTATIONS, implementation, x)
    return chosen.compute(Rule(centred, eps, beside=False), x, weight, bias)[1]


def normalise_beside(
    x: Float[Array, "*batch embed"],
    weight: Float[Array, " embed"] | None = None,
    bias: Float[Array, " embed"] | None = None,
    *,
    centred: bool,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch embed"], Float[Array, "*batch embed"]]:
    """The stream of a residual block, and what its branch reads: `x` itself, and `x` normalised.

    Where the two come together again in the backward pass, their gradients are added in the norm's own kernel.
    Arguments as of `normalise`.
    """
    chosen = choose("norm", IMPLEMENTATIONS, implementation, x)
    return chosen.compute(Rule(centred, eps, beside=True), x, weight, bias)
