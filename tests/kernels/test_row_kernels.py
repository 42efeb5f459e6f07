"""What the row kernels have in common: they compile for the cards that they are for, and divide over a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.activation import activate
from cramjax.kernels.cross_entropy.softmax import SoftmaxRule, softmax_loss
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.kernels.mesh import by_token
from cramjax.kernels.norm import normalise, normalise_beside
from cramjax.planning import compile_for, missing

_TARGETS = ("a100-40gb", "rtx-3090", "rtx-4090", "h100")
needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _shape(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Results, and gradients by all arguments for cotangents of ones."""

    def both(*arguments: Any) -> Any:
        results, pullback = jax.vjp(function, *arguments)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    return both


def _norms(affine: bool) -> tuple[Callable[..., Any], Any]:
    """Of every width that recipes have, in one program."""
    widths = (192, 768, 4096)
    xs = [_shape(2, 1000, width) for width in widths]
    learned = [(_shape(width, dtype="float32"),) * 2 if affine else () for width in widths]

    def compute(xs: Any, learned: Any) -> Any:
        normed = [normalise_beside(x, *own, centred=True, eps=1e-5) for x, own in zip(xs, learned, strict=True)]
        return normed, [normalise(x, *own[:1], centred=False, eps=1e-5) for x, own in zip(xs, learned, strict=True)]

    return _with_gradients(compute), (xs, learned)


def _heads() -> tuple[Callable[..., Any], Any]:
    xs = [_shape(2, 1000, 16, head_dim) for head_dim in (64, 128)]
    angles = [tuple(_shape(1, 1000, 1, x.shape[3] // 2, dtype="float32") for _ in range(2)) for x in xs]

    def compute(xs: Any, angles: Any) -> Any:
        return [
            normalise_and_rotate(x, 12, rotary, eps=eps)
            for eps in (None, 1e-5)
            for x, rotary in zip(xs, angles, strict=True)
        ]

    return lambda xs, angles: _with_gradients(lambda xs: compute(xs, angles))(xs), (xs, angles)


def _activations() -> tuple[Callable[..., Any], Any]:
    def compute(h: Any, wide: Any) -> Any:
        return activate("geglu", h), activate("swiglu", wide)

    return _with_gradients(compute), (_shape(4, 128, 2 * 3072), _shape(4, 128, 2 * 11008))


def _softmaxes() -> tuple[Callable[..., Any], Any]:
    plain, every = SoftmaxRule(None, 0.0, 32768), SoftmaxRule(15.0, 1e-4, 50257)

    def compute(logits: Any, padded: Any, bias: Any, targets: Any, weights: Any) -> Any:
        return softmax_loss(plain, logits, None, targets, weights), softmax_loss(every, padded, bias, targets, weights)

    shapes = _shape(512, 32768), _shape(512, 50304), _shape(50304, dtype="float32")
    return compute, (*shapes, _shape(512, dtype="int32"), _shape(512, dtype="float32"))


_PROGRAMS: dict[str, tuple[Callable[..., Any], Any, tuple[str, ...]]] = {
    "norm": (*_norms(affine=False), ("norm_forward", "norm_backward")),
    "affine norm": (*_norms(affine=True), ("norm_forward", "norm_backward")),
    "heads": (*_heads(), ("heads_forward", "heads_backward")),
    "activation": (
        *_activations(),
        ("geglu_forward", "geglu_backward", "swiglu_forward", "swiglu_backward"),
    ),
    "softmax": (*_softmaxes(), ("softmax_loss",)),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("name", _PROGRAMS)
def test_kernels_compile_at_the_sizes_of_recipes(name: str, target: str) -> None:
    function, arguments, kernels = _PROGRAMS[name]
    text = compile_for(target, function, *arguments).text
    assert all(kernel in text for kernel in kernels)


@needs_compiler
def test_logits_are_written_over() -> None:
    rule, logits = SoftmaxRule(None, 0.0, 50304), _shape(4096, 50304)

    def head(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        losses, gradient = softmax_loss(rule, x @ w, None, targets, weights)
        return losses, gradient @ w.T

    shapes = _shape(4096, 64), _shape(64, 50304), _shape(4096, dtype="int32"), _shape(4096, dtype="float32")
    temporaries = compile_for("h100", head, *shapes).temporaries
    assert temporaries < 1.1 * logits.size * 2  # one array of logits in bfloat16, not two


_MESHED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    # A function of arrays of tokens and then of shared ones, their shapes, and how many of them are shared.
    "norm": (
        lambda x, weight, bias: normalise_beside(x, weight, bias, centred=True, eps=1e-5),
        ((8, 3, 24), (24,), (24,)),
        2,
    ),
    "heads": (
        lambda x, cos, sin: normalise_and_rotate(x, 2, jax.lax.stop_gradient((cos, sin)), eps=1e-5),
        ((8, 3, 3, 6), (1, 3, 1, 3), (1, 3, 1, 3)),
        2,
    ),
    "heads of every sequence": (
        lambda x, cos, sin: normalise_and_rotate(x, 2, jax.lax.stop_gradient((cos, sin))),
        ((8, 3, 3, 6), (8, 3, 1, 3), (8, 3, 1, 3)),
        0,
    ),
    "activation": (lambda h: activate("swiglu", h), ((8, 3, 20),), 0),
}


def _on_four_devices(function: Callable[..., Any], arguments: Any, specs: Any) -> tuple[Any, str]:
    """What a function gives on a mesh, and its compiled text."""
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*placed).compile()
        return compiled(*placed), compiled.as_text() or ""


@pytest.mark.parametrize("name", _MESHED)
@pytest.mark.usefixtures("on_an_h100")
def test_on_a_mesh_each_device_computes_its_own_tokens(name: str) -> None:
    function, shapes, shared = _MESHED[name]
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def gradients(*arguments: jax.Array) -> Any:
        return jax.grad(
            lambda *own: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(*own))), range(len(shapes))
        )(*arguments)

    specs = [jax.P("data")] * (len(shapes) - shared) + [jax.P()] * shared
    got, text = _on_four_devices(gradients, arguments, specs)
    assert "all-gather" not in text and ("all-reduce" in text) == (name == "norm")
    # float32 sums of up to 24 terms near 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, gradients(*arguments))


@pytest.mark.usefixtures("on_an_h100")
def test_on_a_mesh_each_device_takes_the_loss_of_its_own_tokens() -> None:
    rng, rule = np.random.default_rng(0), SoftmaxRule(5.0, 0.1, 30)
    arguments = (
        jnp.asarray(rng.normal(size=(8, 33)), jnp.float32),
        jnp.asarray(rng.integers(0, 30, 8), jnp.int32),
        jnp.ones(8),
        jnp.asarray(rng.normal(size=33), jnp.float32),
    )

    def loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, bias: jax.Array) -> Any:
        def own(bias: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[tuple[()], Any]:
            logits, targets, weights = tokens
            return (), softmax_loss(rule, logits, bias, targets, weights)

        return by_token(own, bias, (logits, targets, weights))[1]

    got, text = _on_four_devices(loss, arguments, [jax.P("data")] * 3 + [jax.P()])
    assert "all-gather" not in text and "all-reduce" not in text
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, loss(*arguments))
