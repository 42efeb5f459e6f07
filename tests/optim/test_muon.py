"""Muon's direction against the SVD, against optax.contrib, and its treatment of fused and stacked matrices.

What it does on GPUs is traced for one and computed here: a product of bfloat16 is summed in float32 and rounded.
"""

import re

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cramjax.config import OptimConfig
from cramjax.gpus import gpu_named
from cramjax.optim import make_optimizer
from cramjax.optim.muon import orthogonalize, scale_by_muon
from cramjax.parallel import make_mesh, on_mesh, param_shardings
from cramjax.planning.targets import tracing_for
from cramjax.recipes import load_recipe
from cramjax.training.parts import Vocabulary, build_model, optimizer_for

from .trees import declared, flatten, nest, random_flat

SHAPES = [(16, 16), (16, 20), (16, 64), (64, 16)]
# In float32, rounding in the Gram matrix (6e-8) is amplified by up to the squared slope at 0 of all iterations but the
# last: 3.4445^8 = 2e4 after five. Well-conditioned matrices see much less.
TOLERANCE = 2e-3
# In bfloat16, in the Frobenius norm: rounding a matrix of norm 1 moves it by 2^-9/√3, which five iterations amplify by
# up to 3.4445^5: 0.55, where the result has a norm of 8 or 9. Later rounding is amplified less.
BFLOAT16_TOLERANCE = 0.1


@jax.jit
def on_cpu(x):
    return orthogonalize([x], 5)[0]


def on_gpu(x, steps=5):
    """What a GPU computes, computed here; rounding is not left out where the compiler might."""
    return traced_for_gpu(lambda x: orthogonalize([x], steps), x)[0]


def traced_for_gpu(function, *arguments):
    with tracing_for(gpu_named("h100")):
        program = jax.make_jaxpr(function)(*arguments)
    compute = jax.jit(jex.jaxpr_as_fun(program), compiler_options={"xla_allow_excess_precision": False})
    return compute(*jax.tree.leaves(arguments))


def products(jaxpr):
    """Shapes, types and contracted axes of all products of a program, loops included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            operands = tuple((v.aval.shape, v.aval.dtype.name) for v in (*equation.invars, *equation.outvars))
            found.append((operands, equation.params["dimension_numbers"]))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


def newton_schulz(values, steps):
    """Jordan's quintic on singular values, as published."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def by_svd(matrix, steps=5):
    """What the iteration computes, from the singular value decomposition in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u * newton_schulz(s / np.linalg.norm(s), steps)) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = np.random.default_rng(0).standard_normal((3, *shape))
    got = np.asarray(on_cpu(jnp.asarray(x, jnp.float32)), np.float64)
    assert got.shape == x.shape
    for matrix, result in zip(x, got, strict=True):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ result @ vt.T
        np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0.0, atol=TOLERANCE)
        near = np.diag(inner)[s > 0.01 * np.linalg.norm(matrix)]
        assert near.size >= 15
        assert near.min() > 0.68 and near.max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_both_forms_apply_the_quintic_to_the_singular_values(shape, steps):
    """Direct and Gram form, on singular values over eight orders of magnitude."""
    rng = np.random.default_rng(2)
    rank = min(shape)
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], rank)))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], rank)))
    x = ((u * np.logspace(0, -8, rank)) @ v.T).astype(np.float32)
    got = jax.jit(lambda x: orthogonalize([x], steps)[0])(x)
    np.testing.assert_allclose(got, by_svd(x, steps), atol=TOLERANCE)


def falling_as(spectrum, rows, columns):
    """A matrix with these singular values and random vectors, float64."""
    rng = np.random.default_rng(4)
    u, _ = np.linalg.qr(rng.standard_normal((rows, len(spectrum))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, len(spectrum))))
    return (u * spectrum) @ v.T


@pytest.mark.parametrize("shape", [(96, 96), (96, 192), (384, 96)])
@pytest.mark.parametrize("spectrum", ["random", "power law", "three orders of magnitude"])
def test_bfloat16_keeps_singular_values_in_the_range_of_the_exact_iteration(shape, spectrum):
    """Against the SVD in float64. On Gram matrices, bfloat16 fails on the last two."""
    x = {
        "random": np.random.default_rng(5).standard_normal(shape),
        "power law": falling_as(1 / np.arange(1, 97), *shape),
        "three orders of magnitude": falling_as(np.logspace(0, -3, 96), *shape),
    }[spectrum]
    got = np.asarray(on_gpu(x.astype(np.float32)), np.float64)
    want, (u, s, vt) = by_svd(x), np.linalg.svd(x, full_matrices=False)
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < BFLOAT16_TOLERANCE
    assert np.linalg.svd(got, compute_uv=False).max() < 1.21
    along = np.diag(u.T @ got @ vt.T)[s > 0.01 * np.linalg.norm(x)]
    assert along.size >= 10
    assert along.min() > 0.67 and along.max() < 1.21


@pytest.mark.parametrize("compute", [on_cpu, on_gpu])
def test_a_zero_gradient_gives_a_zero_update(compute):
    assert not compute(jnp.zeros((2, 8, 24))).any()
    assert not compute(jnp.zeros((2, 8, 8))).any()


@pytest.mark.parametrize("compute", [on_cpu, on_gpu])
def test_scale_does_not_matter(compute):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((8, 8)), jnp.float32)
    # By powers of two, so that rounding to bfloat16 is the same; what is added to the norm, 1e-7, is not scaled.
    np.testing.assert_allclose(compute(2.0**-10 * x), compute(2.0**10 * x), atol=TOLERANCE)


@pytest.mark.parametrize("trace", [lambda f, *x: jax.jit(f)(*x), traced_for_gpu])
def test_matrices_of_one_shape_are_computed_together_as_each_is_alone(trace):
    """Stacked or not, tall or wide, in one list: the same numbers in the same places."""
    shapes = [(8, 20), (3, 20, 8), (8, 8), (1, 8, 8), (2, 2, 8, 20), (20, 9)]
    rng = np.random.default_rng(6)
    matrices = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    together = trace(lambda *x: orthogonalize(x, 5), *matrices)
    for x, got in zip(matrices, together, strict=True):
        assert got.shape == x.shape and got.dtype == jnp.float32
        alone = [trace(lambda x: orthogonalize([x], 5), m)[0] for m in x.reshape(-1, *x.shape[-2:])]
        # Sums may be taken in another order, which moves an entry across a rounding boundary of bfloat16.
        np.testing.assert_allclose(
            got.reshape(-1, *x.shape[-2:]), alone, atol=2e-2 if trace is traced_for_gpu else 1e-5
        )


@pytest.mark.parametrize(("device", "dtype", "count"), [("h100", "bfloat16", 6), (None, "float32", 10)])
def test_a_model_of_gpt_2s_size_has_few_distinct_products_in_its_optimizer(device, dtype, count):
    """48 matrices of 768 × 768, and 24 of 768 × 3072: three products of each, or seven of the Gram matrix.

    Of one shape are all three of the square ones; a compiler that takes in the transposition tells two kinds apart.
    """
    config = load_recipe("gpt-124m")
    model = build_model(config, Vocabulary(50304, 0, None))
    params = model.abstract_params()
    optimizer = optimizer_for(config, model)
    state = jax.eval_shape(optimizer.init, params)
    arguments = params, state, params, 0.5
    if device is None:
        program = jax.make_jaxpr(optimizer.update)(*arguments)
    else:
        with tracing_for(gpu_named(device)):
            program = jax.make_jaxpr(optimizer.update)(*arguments)
    found = products(program.jaxpr)
    assert len(found) == count
    assert len(set(found)) == 4
    assert {shape[0] for operands, _ in found for shape, _ in operands} == {48, 24}
    assert {kind for operands, _ in found for _, kind in operands} == {dtype}
    assert {max(shape) for operands, _ in found for shape, _ in operands} == {768, 3072}
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8), (8, 1)])
def test_devices_that_share_parameters_share_the_matrices_whole(data, fsdp):
    """The numbers of one device; each of them multiplies its share, and nothing is sent while it iterates."""
    shapes = {"blocks/attention/qkv/kernel": (9, 16, 48), "blocks/mlp/down/kernel": (9, 64, 16)}
    gradient = nest(random_flat(0, shapes))
    ours = scale_by_muon(0.95, 5, {"blocks/attention/qkv/kernel": (16, 16, 16)})
    mesh = make_mesh(data, fsdp)
    shardings = param_shardings(mesh, gradient, declared(gradient))
    update = jax.jit(on_mesh(mesh, lambda g: ours.update(g, ours.init(g))[0]), out_shardings=shardings)
    compiled = update.lower(jax.device_put(gradient, shardings)).compile()
    got, want = compiled(jax.device_put(gradient, shardings)), ours.update(gradient, ours.init(gradient))[0]
    for path, x in flatten(want).items():
        np.testing.assert_allclose(flatten(got)[path], x, atol=1e-5)
    text = str(compiled.as_text())
    counts = {int(count) for count in re.findall(r"= f32\[(\d+),16,(?:16|64)\]\S* dot\(", text)}
    assert counts == {-(-27 // fsdp), -(-9 // fsdp)}
    bodies = [part for part in text.split("\n\n") if " dot(" in part and "ENTRY" not in part]
    assert len(bodies) >= 2
    assert not any(re.search("all-reduce|all-gather|all-to-all|collective-permute", body) for body in bodies)


def test_first_direction_equals_optax_contrib():
    """Same iteration, shape scaling and treatment of layers as `optax.contrib.muon`.

    Later directions differ: optax corrects its momentum's bias as NAdam does, Jordan's Muon does not.
    """
    shapes = {"blocks/a/kernel": (2, 8, 20), "blocks/b/kernel": (2, 20, 8), "blocks/c/kernel": (2, 8, 8)}
    axes = nest({path: optax.contrib.MuonDimensionNumbers(-2, -1) for path in shapes})
    peer = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=axes)
    ours = scale_by_muon(0.95, 5)
    gradient = nest(random_flat(0, shapes))
    want, _ = jax.jit(peer.update)(gradient, peer.init(gradient), gradient)
    got, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, x in flatten(want).items():
        np.testing.assert_allclose(flatten(got)[path], x, atol=TOLERANCE)


def test_momentum_is_jordans():
    """github.com/KellerJordan/Muon: buf ← βbuf + (1 − β)g, then the quintic of (1 − β)g + βbuf, times its scale."""
    shapes = {"blocks/a/kernel": (2, 8, 12)}
    ours = scale_by_muon(0.9, 5)
    update = jax.jit(ours.update)
    state, buffer = ours.init(nest(random_flat(0, shapes))), 0.0
    for seed in range(4):
        gradient = random_flat(seed, shapes)
        got, state = update(nest(gradient), state)
        g = np.float64(gradient["blocks/a/kernel"])
        buffer = 0.9 * buffer + 0.1 * g
        for layer, mixed in zip(got["blocks"]["a"]["kernel"], 0.1 * g + 0.9 * buffer, strict=True):
            np.testing.assert_allclose(layer, (12 / 8) ** 0.5 * by_svd(mixed), atol=TOLERANCE)


def test_update_scale_is_the_root_of_outputs_per_input():
    """Jordan et al. 2024: max(1, columns / rows)^½ for a kernel of rows inputs and columns outputs."""
    shapes = {"blocks/up/kernel": (2, 8, 32), "blocks/down/kernel": (2, 32, 8)}
    gradient = nest(random_flat(0, shapes))
    ours = scale_by_muon(0.95, 5)
    updates, _ = jax.jit(ours.update)(gradient, ours.init(gradient))
    for path, scale in {"blocks/up/kernel": 2.0, "blocks/down/kernel": 1.0}.items():
        for layer, g in zip(flatten(updates)[path], flatten(gradient)[path], strict=True):
            np.testing.assert_allclose(layer, scale * by_svd(g), atol=TOLERANCE)


def test_fused_matrices_and_layers_are_orthogonalised_apart():
    shapes = {"blocks/attention/qkv/kernel": (3, 8, 16)}
    widths = (8, 4, 4)
    params, gradient = nest(random_flat(0, shapes)), nest(random_flat(1, shapes))
    config = OptimConfig(name="muon", lr=1.0, clip=None, schedule="constant")
    optimizer = make_optimizer(config, declared(params, {"blocks/attention/qkv/kernel": widths}))
    moved, _, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, 0.0)
    kernel = lambda tree: tree["blocks"]["attention"]["qkv"]["kernel"]  # noqa: E731
    for step, g in zip(kernel(params) - kernel(moved), kernel(gradient), strict=True):
        want = [by_svd(piece) for piece in np.split(np.asarray(g), np.cumsum(widths)[:-1], axis=1)]
        np.testing.assert_allclose(step, np.concatenate(want, axis=1), atol=TOLERANCE)
