"""The kernel for a stack's blocks against their definition in float64."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import GATED
from cramjax.kernels.packed import quantise
from cramjax.kernels.walk import Layers, Matrix, Rule, refusal, walk

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"the kernel cannot run here: {refusal()}")

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, MLP, PAGES, PLACES = 3, 44, 6, 2, 10, 52, 9, 4
RNG = np.random.default_rng(0)


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * RNG.normal(size=shape)).astype(np.float32)


def matrix(inner: int, outer: int, kind: str, biased: bool) -> tuple[Matrix, np.ndarray, np.ndarray]:
    """As the kernel reads it, and in float64 with its bias."""
    w = drawn(LAYERS, inner, outer, size=inner**-0.5)
    bias = drawn(LAYERS, outer, size=0.3) if biased else np.zeros((LAYERS, outer), np.float32)
    own = jnp.asarray(bias) if biased else None
    if kind in ("float32", "bfloat16"):
        held = jnp.asarray(w, kind)
        return Matrix(held, bias=own), np.asarray(held, np.float64), bias.astype(np.float64)
    packed = quantise(jnp.asarray(w), {"int8": 8, "int4": 4}[kind], 2, symmetric=kind == "int8")
    return Matrix(packed.q, packed.scale, packed.zero, own), np.asarray(packed.unpacked(), np.float64), bias


def normalised(x: np.ndarray, norm: tuple[Any, Any], layer: int, rule: Rule) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if rule.centred else x
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + rule.eps)
    weight, bias = (None if part is None else np.asarray(part[layer], np.float64) for part in norm)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def activated(name: str, h: np.ndarray) -> np.ndarray:
    gate, value = np.split(h, 2, -1) if name in GATED else (h, 1.0)
    erf, root = np.vectorize(math.erf), math.sqrt(2 / math.pi)
    ways = {
        "gelu": lambda g: g / 2 * (1 + erf(g / math.sqrt(2))),
        "gelu_tanh": lambda g: g / 2 * (1 + np.tanh(root * (g + 0.044715 * g**3))),
        "swiglu": lambda g: g / (1 + np.exp(-g)),
        "relu2": lambda g: np.maximum(g, 0) ** 2,
    }
    return ways[name.replace("geglu", "gelu")](gate) * value


def turned(heads: np.ndarray, weight: Any, layer: int, rotary: Any, rule: Rule) -> np.ndarray:
    """Heads (tokens, heads, head_dim)."""
    if rule.normalises_heads:
        plain = Rule(**{**vars(rule), "centred": False})
        heads = normalised(heads, (weight, None), layer, plain)
    if rotary is None:
        return heads
    cos, sin = (np.asarray(part, np.float64)[:, None] for part in rotary)
    a, b = np.split(heads, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize(
    ("kind", "activation", "lengths", "options"),
    [
        ("float32", "swiglu", [6], {"rotary": True}),
        ("bfloat16", "gelu", [1, 0, 9], {"biased": True, "centred": True, "window": 4}),
        ("int8", "geglu_tanh", [3, 8], {"rotary": True, "normalises_heads": True, "softcap": 3.0, "bare": True}),
        ("int4", "relu2", [4, 5, 6, 1, 2], {"rotary": True, "normalises_heads": True, "apart": True}),
        ("float32", "gelu_tanh", [11, 12, 10, 9, 8, 7, 6, 5], {"biased": True, "centred": True, "scale": 0.2}),
    ],
)
def test_walk(kind: str, activation: str, lengths: list[int], options: dict[str, Any]):
    """Every kind of weight, norm and activation; nobody's token; texts whose tokens read each other."""
    tokens, biased, bare = len(lengths), options.get("biased", False), options.get("bare", False)
    columns = (HEADS + 2 * KV_HEADS) * HEAD
    wide = MLP * (2 if activation in GATED else 1)
    shapes = [(WIDTH, columns), (HEADS * HEAD, WIDTH), (WIDTH, wide), (MLP, WIDTH)]
    made = [matrix(*shape, kind, biased) for shape in shapes]

    def norm(width: int) -> tuple[Any, Any]:
        return None if bare else 1 + drawn(LAYERS, width, size=0.2), drawn(LAYERS, width) if biased else None

    norms, heads = [norm(WIDTH), norm(WIDTH)], (norm(HEAD)[0], norm(HEAD)[0])
    rule = Rule(
        HEADS,
        activation,  # pyright: ignore[reportArgumentType]
        centred=options.get("centred", False),
        eps=1e-5,
        normalises_heads=options.get("normalises_heads", False),
        scale=options.get("scale", HEAD**-0.5),
        softcap=options.get("softcap"),
        window=options.get("window"),
    )
    angles = drawn(tokens, HEAD // 2)
    rotary = (jnp.cos(angles), jnp.sin(angles)) if options.get("rotary") else None
    apart = options.get("apart", False)
    # Each text has pages of its own; where tokens are of one text, the first three are, and the others of another one.
    texts = [0, 0, 0, 1, 1] if apart else range(tokens)
    table = RNG.permutation(PAGES - 1)[:8].reshape(2, 4) if apart else None
    table = np.stack([table[text] for text in texts]) if table is not None else RNG.permutation(24).reshape(8, 3)
    pages = PAGES if apart else 24
    table, lengths_of = table[:tokens], np.asarray(lengths)
    x, keys, values = drawn(tokens, WIDTH), drawn(LAYERS, pages, PLACES, KV_HEADS, HEAD), None
    values = drawn(*keys.shape)
    layers = Layers(
        *(each[0] for each in made),
        attention_norm=tuple(None if part is None else jnp.asarray(part) for part in norms[0]),  # pyright: ignore
        mlp_norm=tuple(None if part is None else jnp.asarray(part) for part in norms[1]),  # pyright: ignore
        head_norms=tuple(None if part is None else jnp.asarray(part) for part in heads),  # pyright: ignore
    )
    given = jnp.asarray(keys), jnp.asarray(values), jnp.asarray(table), jnp.asarray(lengths_of)
    got, got_keys, got_values = walk(jnp.asarray(x), layers, rule, rotary, *given, apart=apart)

    stream, k, v = x.astype(np.float64), keys.astype(np.float64), values.astype(np.float64)
    for layer in range(LAYERS):
        (qkv, qkv_bias), (out, out_bias), (up, up_bias), (down, down_bias) = [(m[1][layer], m[2][layer]) for m in made]
        parts = (normalised(stream, norms[0], layer, rule) @ qkv + qkv_bias).reshape(tokens, -1, HEAD)
        q, new_k, new_v = np.split(parts, [HEADS, HEADS + KV_HEADS], 1)
        q, new_k = turned(q, heads[0], layer, rotary, rule), turned(new_k, heads[1], layer, rotary, rule)
        for token, length in enumerate(lengths):
            if length:
                at = layer, table[token, (length - 1) // PLACES], (length - 1) % PLACES
                k[at], v[at] = new_k[token], new_v[token]
        mixed = np.zeros((tokens, HEADS, HEAD))
        for token, length in enumerate(lengths):
            start = max(0, length - (rule.window or length))
            seen = [pool[layer, table[token]].reshape(-1, KV_HEADS, HEAD)[start:length] for pool in (k, v)]
            for head in range(HEADS if length else 0):
                own, values_of = (each[:, head * KV_HEADS // HEADS] for each in seen)
                scores = rule.scale * own @ q[token, head]
                scores = scores if rule.softcap is None else rule.softcap * np.tanh(scores / rule.softcap)
                weights = np.exp(scores - scores.max())
                mixed[token, head] = weights @ values_of / weights.sum()
        stream = stream + mixed.reshape(tokens, -1) @ out + out_bias
        h = normalised(stream, norms[1], layer, rule) @ up + up_bias
        stream = stream + activated(activation, h) @ down + down_bias
    # Three layers of sums of some fifty terms in float32.
    for mine, right in ((got, stream), (got_keys, k), (got_values, v)):
        np.testing.assert_allclose(mine, right, atol=2e-5 * max(1.0, float(np.abs(right).max())))
