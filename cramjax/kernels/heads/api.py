"""The public function: it chooses an implementation, and leaves out what the model does not have."""

from jaxtyping import Array, Float

from cramjax.kernels import rows
from cramjax.kernels.choice import Implementation, choose, never
from cramjax.kernels.heads import pallas, reference, xla


def _pallas_refusal(x: Array, weights: tuple[Array, Array] | None) -> str | None:
    if weights is not None:
        return "its norm has no weights"
    if x.shape[3] % 2:
        return f"it takes heads in two halves, which heads of {x.shape[3]} do not have"
    if x.shape[0] > rows.MOST_BLOCKS:
        return f"CUDA has at most {rows.MOST_BLOCKS} blocks for as many sequences, and there are {x.shape[0]}"
    return rows.refusal(x, x.shape[3])


IMPLEMENTATIONS = (
    Implementation("pallas", pallas.normalise_and_rotate, _pallas_refusal),
    Implementation("xla", xla.normalise_and_rotate, never),
    Implementation("reference", reference.normalise_and_rotate, never),
)


def normalise_and_rotate(
    x: Float[Array, "batch seq all_heads head_dim"],
    queries: int,
    rotary: tuple[Float[Array, "rows seq 1 half"], Float[Array, "rows seq 1 half"]] | None = None,
    *,
    eps: float | None = None,
    weights: tuple[Float[Array, " head_dim"], Float[Array, " head_dim"]] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch seq heads head_dim"], Float[Array, "batch seq kv_heads head_dim"]]:
    """Queries and keys out of their common product: normalised per head, turned by their positions, and apart.

    The norm is RMSNorm (Henry et al. 2020, "Query-Key Normalization", with the root mean square in
    place of the length); the rotation that of RoPE (Su et al. 2021, eq. 15), of the pairs (x[i], x[i + head_dim / 2]).

    Args:
        x: heads of queries, then of keys (batch, seq, heads + kv_heads, head_dim).
        queries: heads of queries.
        rotary: cosines and sines of the angles (rows, seq, 1, head_dim / 2); one row serves a whole batch. None: no
            rotation.
        eps: added to the mean square. None: no norm.
        weights: multiply normalised queries and keys (head_dim,) each. None: none.
        implementation: one of `IMPLEMENTATIONS`, by name. Default: the first that can run.

    Returns:
        Queries (batch, seq, heads, head_dim) and keys (batch, seq, kv_heads, head_dim), in the precision of `x`.

    Raises:
        ValueError: weights without a norm.
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    if weights is not None and eps is None:
        raise ValueError("weights are those of a norm, and eps is None: there is no norm")
    chosen = choose("norm and rotation of heads", IMPLEMENTATIONS, implementation, x, weights)
    if weights is None:
        return chosen.compute(queries, eps, x, rotary)
    return chosen.compute(queries, eps, x, rotary, weights)
