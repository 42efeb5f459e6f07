"""The kernels that `cramjax check` computes: what each is given, how it is called, and what it is by definition.

A new kernel is one more function in `KERNELS`, which makes its cases for a size.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.config import Activation
from cramjax.kernels.attention import attention, implementations
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.reference import reference
from cramjax.kernels.cross_entropy import (
    Tail,
    adaptive_cross_entropy_sum,
    adaptive_logits,
    cross_entropy,
    cross_entropy_sum,
)
from cramjax.kernels.dense import dense
from cramjax.model.layers import activate
from cramjax.model.norm import normalise
from cramjax.planning.measure import zipf_tokens

_GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Shapes of the kernels' operands: by default those of a microbatch of gpt-124m, and of crammed-bert's."""

    batch: int = 16
    seq: int = 1024
    encoder_batch: int = 512
    encoder_seq: int = 128
    heads: int = 12
    head_dim: int = 64
    mlp: int = 3072
    vocab: int = 50304

    @property
    def width(self) -> int:
        """Numbers in a token's row of the residual stream."""
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Rows of a microbatch."""
        return self.batch * self.seq


def sizes_for(platform: str, memory: int, *, quick: bool) -> Sizes:
    """Sizes that a device checks in minutes, or in seconds: the recipes' own on a GPU that holds them.

    Args:
        platform: `cpu` or another.
        memory: of the device, in bytes. The float32 references take the most of it: six arrays as large as the logits.
        quick: whether smaller ones will do.
    """
    if platform == "cpu":
        small = Sizes(batch=1, seq=256, encoder_batch=2, heads=4, head_dim=32, mlp=512, vocab=1024)
        return small if quick else replace(small, batch=2, encoder_batch=8, head_dim=64, mlp=1024, vocab=8192)
    share = 16 if quick else 1 if memory >= 36 * _GIB else 4 if memory >= 11 * _GIB else 16
    return Sizes(batch=16 // share, encoder_batch=512 // share, vocab=8192 if quick else 50304)


@dataclass(frozen=True)
class Case:
    """A kernel's function on operands of given shapes, and the same by definition.

    Both functions take the operands by name. Activations are drawn with a standard deviation of 1, matrices with one
    over the square root of their rows, vectors with 1; all hold values of the precision that is checked.
    """

    name: str
    compute: Callable[..., Any]
    """What is checked: `(implementation, **operands) -> output`."""
    reference: Callable[..., Any]
    """Its definition: `(**operands) -> output`, traced in float32 with products at highest precision."""
    activations: Mapping[str, tuple[int, ...]]
    """Shapes of what comes in the compute precision, by name."""
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what comes in float32, as parameters do, by name."""
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What is not differentiated: masks, positions, targets."""
    implementations: tuple[str, ...] = ("xla",)
    """In the order they are tried: the first that does not refuse by a `ConfigError` is what a run gets."""
    timed: bool = False
    """Whether this is what the recipes ask for: it is checked in both precisions, and timed."""
    products: bool = True
    """Whether it has matrix products, which GPUs do in TF32 where float32 is asked for."""


def attention_cases(sizes: Sizes) -> list[Case]:
    """Every mask of attention, at the shapes of gpt-124m and crammed-bert; its reference is not checked itself."""
    rng, (batch, seq) = np.random.default_rng(0), (sizes.batch, sizes.seq)
    documents = np.cumsum(rng.random((batch, seq)) < 8 / seq, axis=1).astype(np.int32)
    lengths = rng.integers(seq // 4, seq, (batch, 1))
    lengths[0] = seq // 2
    padding = np.arange(seq) < lengths
    padding[-1, : seq // 8] = False  # the first queries of a causal row then see nothing at all
    at = rng.integers(0, seq - 4, (batch, 1)) + np.arange(4)
    names = tuple(name for name in implementations() if name != "reference")

    def case(
        name: str,
        batch: int = batch,
        seq: int = seq,
        *,
        queries: int | None = None,
        kv_heads: int = sizes.heads,
        timed: bool = False,
        softcap: float | None = None,
        causal: bool = False,
        window: int | None = None,
        **others: np.ndarray,
    ) -> Case:
        def compute(implementation: str, q: Any, k: Any, v: Any, **arrays: Any) -> Any:
            options = {"causal": causal, "window": window, "softcap": softcap}
            return attention(q, k, v, **options, **arrays, implementation=implementation)

        def by_definition(q: Any, k: Any, v: Any, **arrays: Any) -> Any:
            segments = arrays.get("segment_ids")
            mask = Mask(causal, window, segments, segments, arrays.get("kv_mask"), arrays.get("query_positions"))
            return reference(q, k, v, mask, scale=sizes.head_dim**-0.5, softcap=softcap)

        shape, keys = (batch, queries or seq, sizes.heads, sizes.head_dim), (batch, seq, kv_heads, sizes.head_dim)
        operands = {"q": shape, "k": keys, "v": keys}
        return Case(name, compute, by_definition, operands, others=others, implementations=names, timed=timed)

    return [
        case("causal", causal=True, timed=True),
        case("full", sizes.encoder_batch, sizes.encoder_seq, timed=True),
        case("window", window=seq // 4),
        case("causal window", causal=True, window=seq // 4),
        case("documents", segment_ids=documents),
        case("causal documents", causal=True, segment_ids=documents),
        case("padding", kv_mask=padding),
        case("causal padding", causal=True, kv_mask=padding),
        case("grouped heads", causal=True, kv_heads=sizes.heads // 4),
        case("soft-cap", causal=True, softcap=2.0),
        case("decoding", causal=True, queries=4, query_positions=at.astype(np.int32)),
    ]


def cross_entropy_cases(sizes: Sizes) -> list[Case]:
    """The losses of a linear head, and what each may have beside it."""
    rng, tokens, vocab = np.random.default_rng(0), sizes.tokens, sizes.vocab

    def case(
        name: str, *, timed: bool = False, tied: bool = False, bias: bool = False, some: bool = False, **options: Any
    ) -> Case:
        def compute(implementation: str, hidden: Any, weight: Any, targets: Any, **arrays: Any) -> Any:
            del implementation
            weight = weight.T if tied else weight
            return cross_entropy_sum(hidden, weight, targets, **arrays, **options, tied=tied).total

        def by_definition(hidden: Any, weight: Any, targets: Any, token_weights: Any = 1.0, bias: Any = None) -> Any:
            found = cross_entropy(hidden, weight.T if tied else weight, targets, bias=bias, **options)
            return jnp.sum((found.nll + found.penalty) * token_weights)

        others: dict[str, Any] = {"targets": rng.integers(0, options.get("vocab_size", vocab), tokens).astype(np.int32)}
        if some:
            others["token_weights"] = (rng.random(tokens) < 0.8).astype(np.float32)
        weights = {"weight": (vocab, sizes.width) if tied else (sizes.width, vocab)}
        weights |= {"bias": (vocab,)} if bias else {}
        return Case(name, compute, by_definition, {"hidden": (tokens, sizes.width)}, weights, others, timed=timed)

    return [
        case("tied, soft-cap", tied=True, softcap=2.0, timed=True),
        case("tied", tied=True, timed=True),
        case("token weights, bias", some=True, bias=True),
        case("z-loss", z_loss=1e-3),
        case("padded vocabulary", vocab_size=vocab - 24),
    ]


def adaptive_cases(sizes: Sizes) -> list[Case]:
    """The adaptive softmax: on tokens as frequent as a text's, and on so many rare ones that tails have no room."""
    vocab, width, cuts = sizes.vocab, sizes.width, (sizes.vocab // 8, sizes.vocab // 2)

    def tails(weights: Mapping[str, Any]) -> list[Tail]:
        return [Tail(weights[f"down{i}"], weights[f"decoder{i}"]) for i in range(2)]

    def compute(
        implementation: str, hidden: Any, head: Any, targets: Any, softcap: float | None, **weights: Any
    ) -> Any:
        del implementation
        options = {"softcap": softcap, "vocab_size": vocab}
        return adaptive_cross_entropy_sum(hidden, head, targets, tails=tails(weights), **options).total

    def by_definition(hidden: Any, head: Any, targets: Any, softcap: float | None, **weights: Any) -> Any:
        found = adaptive_logits(hidden, head, tails=tails(weights), softcap=softcap, vocab_size=vocab)
        return -jnp.sum(jnp.take_along_axis(found, targets[:, None], axis=1))

    shapes = {
        "head": (width, cuts[0] + 2),
        "down0": (width, width // 2),
        "decoder0": (width // 2, cuts[1] - cuts[0]),
        "down1": (width, width // 4),
        "decoder1": (width // 4, vocab - cuts[1]),
    }
    rare = np.random.default_rng(0).integers(0, vocab, sizes.tokens).astype(np.int32)
    frequent = zipf_tokens(vocab, (sizes.tokens,))
    return [
        Case(
            name,
            functools.partial(compute, softcap=softcap),
            functools.partial(by_definition, softcap=softcap),
            {"hidden": (sizes.tokens, width)},
            shapes,
            {"targets": targets},
            timed=timed,
        )
        for name, targets, softcap, timed in (
            ("frequent tokens", frequent, None, True),
            ("rare tokens, soft-cap", rare, 2.0, False),
        )
    ]


def dense_cases(sizes: Sizes) -> list[Case]:
    """The first product of a feed-forward layer, with its two gradients."""

    def compute(implementation: str, x: Any, w: Any, bias: Any = None) -> Any:
        del implementation
        return dense(x, w, bias, dtype=x.dtype)

    def by_definition(x: Any, w: Any, bias: Any = 0.0) -> Any:
        return x @ w + bias

    x, w = {"x": (sizes.batch, sizes.seq, sizes.width)}, {"w": (sizes.width, sizes.mlp)}
    return [
        Case("product", compute, by_definition, x, w, timed=True),
        Case("product, bias", compute, by_definition, x, {**w, "bias": (sizes.mlp,)}),
    ]


def norm_cases(sizes: Sizes) -> list[Case]:
    """RMS norm as gpt-124m has it, and LayerNorm as crammed-bert does."""
    eps = 1e-5

    def compute(implementation: str, x: Any, weight: Any = None, bias: Any = None) -> Any:
        del implementation
        return normalise(weight is not None, eps, x, weight, bias)

    def rms_norm(x: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        return rms_norm(x - jnp.mean(x, axis=-1, keepdims=True)) * weight + bias

    x, affine = {"x": (sizes.batch, sizes.seq, sizes.width)}, {"weight": (sizes.width,), "bias": (sizes.width,)}
    return [
        Case("RMS norm", compute, rms_norm, x, timed=True, products=False),
        Case("LayerNorm", compute, layer_norm, x, affine, timed=True, products=False),
    ]


def activation_cases(sizes: Sizes) -> list[Case]:
    """The non-linearities of feed-forward layers, gated and not."""

    def gated(activation: Callable[[Any], Any], h: Any) -> Any:
        gate, x = jnp.split(h, 2, axis=-1)
        return activation(gate) * x

    gelu = functools.partial(jax.nn.gelu, approximate=False)
    definitions: dict[Activation, Callable[[Any], Any]] = {
        "relu2": lambda h: jax.nn.relu(h) ** 2,
        "geglu": functools.partial(gated, gelu),
        "swiglu": functools.partial(gated, jax.nn.silu),
        "gelu": gelu,
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    }
    return [
        Case(
            name,
            lambda implementation, h, name=name: activate(name, h),
            lambda h, definition=definition: definition(h),
            {"h": (sizes.batch, sizes.seq, sizes.mlp)},
            timed=name in ("relu2", "geglu"),
            products=False,
        )
        for name, definition in definitions.items()
    ]


KERNELS: dict[str, Callable[[Sizes], Sequence[Case]]] = {
    "attention": attention_cases,
    "cross-entropy": cross_entropy_cases,
    "adaptive-softmax": adaptive_cases,
    "dense": dense_cases,
    "norm": norm_cases,
    "activation": activation_cases,
}
