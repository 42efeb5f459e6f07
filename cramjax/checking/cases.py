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

from cramjax import devices
from cramjax.config import Activation
from cramjax.kernels.activation import activate
from cramjax.kernels.attention import attention
from cramjax.kernels.attention.api import preference
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.reference import reference
from cramjax.kernels.cross_entropy import (
    Tail,
    adaptive_cross_entropy_sum,
    adaptive_logits,
    cross_entropy,
    cross_entropy_sum,
)
from cramjax.kernels.cross_entropy.softmax import SoftmaxRule, softmax_loss
from cramjax.kernels.dense import dense, projections
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.kernels.norm import normalise, normalise_beside
from cramjax.model.positions import rotary_angles
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

    The plain references that some kernels have among their implementations are not checked themselves.
    Both functions take the operands by name. Activations are drawn with a standard deviation of 1, matrices with one
    over the square root of their rows, vectors with 1; all hold values of the precision that is checked.
    """

    name: str
    compute: Callable[..., Any]
    """What is checked: `(implementation, **operands) -> output`, an array or a tuple of them."""
    reference: Callable[..., Any]
    """Its definition: `(**operands) -> output`, traced in float32 with products at highest precision."""
    activations: Mapping[str, tuple[int, ...]]
    """Shapes of what comes in the compute precision, by name."""
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what comes in float32, as parameters do, by name."""
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What is not differentiated: masks, positions, targets."""
    implementations: Sequence[str] = ("xla",)
    """In the order they are tried: the first that does not refuse by a `ConfigError` is what a run gets."""
    timed: bool = False
    """Whether this is what the recipes ask for: it is checked in both precisions, and timed."""
    products: bool = True
    """Whether it has matrix products, which GPUs do in TF32 where float32 is asked for."""


def attention_cases(sizes: Sizes) -> list[Case]:
    """Every mask of attention, at the shapes of gpt-124m and crammed-bert."""
    rng, (batch, seq) = np.random.default_rng(0), (sizes.batch, sizes.seq)
    documents = np.cumsum(rng.random((batch, seq)) < 8 / seq, axis=1).astype(np.int32)
    lengths = rng.integers(seq // 4, seq, (batch, 1))
    lengths[0] = seq // 2
    padding = np.arange(seq) < lengths
    padding[-1, : seq // 8] = False  # the first queries of a causal row then see nothing at all
    at = rng.integers(0, seq - 4, (batch, 1)) + np.arange(4)

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
        order = preference(devices.target(), causal=causal, length=seq, head_dim=sizes.head_dim)
        names = [name for name in order if name != "reference"]
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
        hidden = {"hidden": (tokens, sizes.width)}
        return Case(name, compute, by_definition, hidden, weights, others, implementations=("fused",), timed=timed)

    return [
        case("tied, soft-cap", tied=True, softcap=2.0, timed=True),
        case("tied", tied=True, timed=True),
        case("token weights, bias", some=True, bias=True),
        case("z-loss", z_loss=1e-3),
        case("padded vocabulary", vocab_size=vocab - 24),
    ]


def softmax_cases(sizes: Sizes) -> list[Case]:
    """The part of cross entropy that comes in several implementations: from logits to losses and their gradient."""
    rng, tokens, vocab = np.random.default_rng(0), sizes.tokens, sizes.vocab
    others = {
        "targets": rng.integers(0, vocab - 24, tokens).astype(np.int32),
        "token_weights": rng.random(tokens).astype(np.float32),
    }

    def case(name: str, rule: SoftmaxRule, *, biased: bool = False, timed: bool = False) -> Case:
        def compute(implementation: str, logits: Any, bias: Any = None, **tokens: Any) -> Any:
            @jax.custom_vjp
            def total(logits: Any) -> Any:
                return forward(logits)[0]

            def forward(logits: Any) -> Any:
                losses, gradient = softmax_loss(rule, logits, bias, **tokens, implementation=implementation)
                each = losses.nll + rule.z_loss * losses.log_partition**2
                return jnp.sum(each * tokens["token_weights"]), gradient

            total.defvjp(forward, lambda gradient, g: ((g * gradient).astype(gradient.dtype),))
            return total(logits)

        def by_definition(logits: Any, targets: Any, token_weights: Any, bias: Any = 0.0) -> Any:
            logits = logits + bias
            if rule.softcap is not None:
                logits = rule.softcap * jnp.tanh(logits / rule.softcap)
            logits = logits[:, : rule.vocab_size]
            log_partition = jax.nn.logsumexp(logits, axis=-1)
            nll = log_partition - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            return jnp.sum((nll + rule.z_loss * log_partition**2) * token_weights)

        bias = {"bias": rng.normal(size=vocab).astype(np.float32)} if biased else {}
        return Case(
            name,
            compute,
            by_definition,
            {"logits": (tokens, vocab)},
            others={**others, **bias},
            implementations=("pallas", "xla"),
            timed=timed,
            products=False,
        )

    return [
        case("soft-cap", SoftmaxRule(2.0, 0.0, vocab), timed=True),
        case("plain", SoftmaxRule(None, 0.0, vocab), timed=True),
        case("bias, z-loss, padding", SoftmaxRule(None, 1e-3, vocab - 24), biased=True),
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
            implementations=("fused",),
            timed=timed,
        )
        for name, targets, softcap, timed in (
            ("frequent tokens", frequent, None, True),
            ("rare tokens, soft-cap", rare, 2.0, False),
        )
    ]


def dense_cases(sizes: Sizes) -> list[Case]:
    """Products of activations with weights, and both gradients: one for the feed-forward layer, three for attention."""
    width = sizes.width

    def compute(implementation: str, x: Any, w: Any, bias: Any = None) -> Any:
        del implementation
        return dense(x, w, bias, dtype=x.dtype)

    def by_definition(x: Any, w: Any, bias: Any = 0.0) -> Any:
        return x @ w + bias

    def compute_apart(implementation: str, x: Any, w: Any) -> Any:
        del implementation
        return projections(x, w, (width, width, width), dtype=x.dtype)

    def apart_by_definition(x: Any, w: Any) -> Any:
        return tuple(x @ part for part in jnp.split(w, 3, axis=1))

    x, up = {"x": (sizes.batch, sizes.seq, width)}, (width, sizes.mlp)
    return [
        Case("product", compute, by_definition, x, {"w": up}, timed=True),
        Case("product, bias", compute, by_definition, x, {"w": up, "bias": (sizes.mlp,)}),
        Case("three products", compute_apart, apart_by_definition, x, {"w": (width, 3 * width)}, timed=True),
    ]


def norm_cases(sizes: Sizes) -> list[Case]:
    """RMS norm as gpt-124m has it and LayerNorm as crammed-bert does, alone and beside the residual stream."""
    eps = 1e-5

    def compute(implementation: str, x: Any, weight: Any = None, bias: Any = None) -> Any:
        options = {"centred": weight is not None, "eps": eps, "implementation": implementation}
        return normalise(x, weight, bias, **options)

    def compute_beside(implementation: str, x: Any, weight: Any = None, bias: Any = None) -> Any:
        options = {"centred": weight is not None, "eps": eps, "implementation": implementation}
        return normalise_beside(x, weight, bias, **options)

    def rms_norm(x: Any) -> Any:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)

    def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
        return rms_norm(x - jnp.mean(x, axis=-1, keepdims=True)) * weight + bias

    def beside(norm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, **affine: (x, norm(x, **affine))

    x, affine = {"x": (sizes.batch, sizes.seq, sizes.width)}, {"weight": (sizes.width,), "bias": (sizes.width,)}
    options: dict[str, Any] = {"implementations": ("pallas", "xla"), "products": False}
    return [
        Case("RMS norm, stream", compute_beside, beside(rms_norm), x, timed=True, **options),
        Case("LayerNorm, stream", compute_beside, beside(layer_norm), x, affine, timed=True, **options),
        Case("RMS norm", compute, rms_norm, x, **options),
        Case("LayerNorm", compute, layer_norm, x, affine, **options),
    ]


def heads_cases(sizes: Sizes) -> list[Case]:
    """Queries and keys out of their product: normalised and turned."""
    eps, width = 1e-5, sizes.head_dim
    cos, sin = map(np.asarray, rotary_angles(jnp.arange(sizes.seq)[None], width, 10_000.0))

    def case(name: str, kv_heads: int, *, norm: bool, turned: bool, timed: bool = False) -> Case:
        def compute(implementation: str, x: Any, **angles: Any) -> Any:
            rotary, own_eps = (angles["cos"], angles["sin"]) if turned else None, eps if norm else None
            return normalise_and_rotate(x, sizes.heads, rotary, eps=own_eps, implementation=implementation)

        def by_definition(x: Any, **angles: Any) -> Any:
            if norm:
                x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
            if turned:
                # Pairs as complex numbers, times e^iφ.
                pairs = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * (angles["cos"] + 1j * angles["sin"])
                x = jnp.concatenate([pairs.real, pairs.imag], axis=-1)
            return x[:, :, : sizes.heads], x[:, :, sizes.heads :]

        return Case(
            name,
            compute,
            by_definition,
            {"x": (sizes.batch, sizes.seq, sizes.heads + kv_heads, width)},
            others={"cos": cos, "sin": sin} if turned else {},
            implementations=("pallas", "xla"),
            timed=timed,
            products=False,
        )

    return [
        case("norm, rotation", sizes.heads, norm=True, turned=True, timed=True),
        case("rotation", sizes.heads, norm=False, turned=True),
        case("grouped heads", sizes.heads // 4, norm=True, turned=True),
        case("norm", sizes.heads, norm=True, turned=False),
    ]


def activation_cases(sizes: Sizes) -> list[Case]:
    """The non-linearities of feed-forward layers, gated and not."""

    def gated(activation: Callable[[Any], Any], h: Any) -> Any:
        gate, x = jnp.split(h, 2, axis=-1)
        return activation(gate) * x

    gelu = functools.partial(jax.nn.gelu, approximate=False)
    definitions: dict[Activation, Callable[[Any], Any]] = {
        "relu2": lambda h: jax.nn.relu(h) ** 2,
        "geglu": lambda h: gated(gelu, h),
        "geglu_tanh": lambda h: gated(functools.partial(jax.nn.gelu, approximate=True), h),
        "swiglu": lambda h: gated(jax.nn.silu, h),
        "gelu": lambda h: gelu(h),
        "gelu_tanh": lambda h: jax.nn.gelu(h, approximate=True),
    }

    def case(name: Activation, definition: Callable[[Any], Any]) -> Case:
        def compute(implementation: str, h: Any) -> Any:
            return activate(name, h, implementation)

        return Case(
            name,
            compute,
            definition,
            {"h": (sizes.batch, sizes.seq, sizes.mlp)},
            implementations=("pallas", "xla"),
            timed=name in ("relu2", "geglu"),
            products=False,
        )

    return [case(name, definition) for name, definition in definitions.items()]


KERNELS: dict[str, Callable[[Sizes], Sequence[Case]]] = {
    "attention": attention_cases,
    "cross-entropy": cross_entropy_cases,
    "softmax": softmax_cases,
    "adaptive-softmax": adaptive_cases,
    "dense": dense_cases,
    "norm": norm_cases,
    "heads": heads_cases,
    "activation": activation_cases,
}
