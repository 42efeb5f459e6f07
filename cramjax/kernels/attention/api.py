"""The public attention function: it checks shapes, chooses an implementation, and logs each refusal once."""

from jaxtyping import Array, Bool, Float, Int

from cramjax import devices
from cramjax.kernels.attention.cudnn import cudnn, cudnn_refusal
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.pallas import pallas, pallas_refusal
from cramjax.kernels.attention.reference import reference
from cramjax.kernels.attention.xla import xla
from cramjax.kernels.choice import Implementation, choose, never

IMPLEMENTATIONS = {
    each.name: each
    for each in (
        Implementation("pallas", pallas, pallas_refusal),
        Implementation("cudnn", cudnn, cudnn_refusal),
        Implementation("xla", xla, never),
        Implementation("reference", reference, never),
    )
}


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch kv_seq kv_heads head_dim"],
    v: Float[Array, "batch kv_seq kv_heads head_dim"],
    *,
    causal: bool,
    window: int | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
    kv_segment_ids: Int[Array, "batch kv_seq"] | None = None,
    kv_mask: Bool[Array, "batch kv_seq"] | None = None,
    query_positions: Int[Array, "batch seq"] | None = None,
    shared: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention with grouped-query heads; a query that sees no key yields zeros.

    Args:
        q: queries (batch, seq, heads, head_dim).
        k: keys (batch, kv_seq, kv_heads, head_dim); each serves heads / kv_heads consecutive query heads.
        v: values, shaped as the keys.
        causal: a query sees no later key.
        window: a query sees keys less than this many positions away, itself included (both ways unless causal).
        segment_ids: document of each query (batch, seq); it sees keys of its own document.
        kv_segment_ids: document of each key (batch, kv_seq). Default: `segment_ids`.
        kv_mask: False where a key is padding (batch, kv_seq).
        query_positions: index of each query among the keys (batch, seq). Default: 0, 1, …
        shared: the first keys, so many, belong to every document.
        scale: multiplies the scores. Default: 1 / sqrt(head_dim).
        softcap: squashes the scores into ±softcap: softcap · tanh(scores / softcap).
        implementation: one of `implementations()`. Default: the first that can run.

    Returns:
        Weighted values, shaped and typed as the queries.

    Raises:
        ValueError: shapes that do not fit together.
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    _check(q, k, v, segment_ids, kv_segment_ids, kv_mask, query_positions)
    shared = 0 if segment_ids is None else shared  # there is one document
    mask = Mask(causal, window, segment_ids, kv_segment_ids, kv_mask, query_positions, shared)
    chosen = choose("attention", _ordered(q, k, mask), implementation, q, k, mask, softcap)
    return chosen.compute(q, k, v, mask, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)


def implementations() -> tuple[str, ...]:
    """Names of the implementations."""
    return tuple(IMPLEMENTATIONS)


def preference(target: devices.Target, *, causal: bool, length: int, head_dim: int) -> tuple[str, ...]:
    """Names of the implementations in the order in which they are tried: the fastest first, where it is known.

    On a Hopper card cuDNN was measured faster than the kernels in Pallas, forward and backward, but for the encoder's
    128 tokens that all see each other (benchmarks/README.md, "One H100"). Before Hopper others report it slower than
    flash attention (0.8 on an A100; huggingface/transformers, pull request 48163), and after Hopper nothing is known.

    Args:
        target: the device that is traced for.
        causal: whether queries see no later key.
        length: queries.
        head_dim: width of a head.
    """
    hopper = target.platform == "gpu" and (target.capability or "").startswith("9.")
    fast = hopper and head_dim in (64, 128) and (causal or length >= 512)
    return ("cudnn", "pallas", "xla", "reference") if fast else ("pallas", "cudnn", "xla", "reference")


def _ordered(q: Array, k: Array, mask: Mask) -> list[Implementation]:
    names = preference(devices.target(), causal=mask.causal, length=max(q.shape[1], k.shape[1]), head_dim=q.shape[3])
    return [IMPLEMENTATIONS[name] for name in names]


def _check(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    kv_segment_ids: Array | None,
    kv_mask: Array | None,
    query_positions: Array | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must have shape (batch, seq, heads, head_dim), got {q.shape} and {k.shape}")
    batch, length, heads, head_dim = q.shape
    kv_length, kv_heads = k.shape[1], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {kv_heads} for {heads} heads")
    wanted = {
        "k": (k, (batch, kv_length, kv_heads, head_dim)),
        "v": (v, k.shape),
        "segment_ids": (segment_ids, (batch, length)),
        "kv_segment_ids": (kv_segment_ids, (batch, kv_length)),
        "kv_mask": (kv_mask, (batch, kv_length)),
        "query_positions": (query_positions, (batch, length)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for q of shape {q.shape}, got {array.shape}")
    if (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("kv_segment_ids needs segment_ids, the documents of the queries")
