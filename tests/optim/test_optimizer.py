"""Optimizers against float64 recursions written from the papers, against other libraries, and by property."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cramjax.config import OptimConfig
from cramjax.errors import ConfigError
from cramjax.optim import make_optimizer

from .trees import ROLE, SHAPES, declared, flatten, nest, random_flat

NAMES = ["adamw", "muon", "lion", "adan", "sophia", "adafactor", "schedule_free_adamw"]
FRACTIONS = [0.0, 0.2, 0.55, 0.9]
# Four float32 steps of size ≤ 0.1 on weights of size ~1: a few roundings of 6e-8, some through a division.
TOLERANCE = 5e-6
CONFIG = OptimConfig(
    lr=0.1, embed_lr=0.03, head_lr=0.02, scalar_lr=0.05, beta1=0.9, beta2=0.95, weight_decay=0.2, clip=None, decay=0.5
)
RATE = {"embedding": 0.03, "head": 0.02, "matrix": 0.1, "scalar": 0.05}


def wsd(x):
    return min(1.0, (1 - x) / 0.5)


def config_of(name, **fields):
    return replace(CONFIG, name=name, **fields)


def run(config, start, gradients, fractions, objective=None):
    """The optimizer under test over several steps; returns final flat params, its state, and the optimizer."""
    params = nest(start)
    optimizer = make_optimizer(config, declared(params))
    update = jax.jit(lambda *args: optimizer.update(*args, objective=objective))
    state = jax.jit(optimizer.init)(params)
    for gradient, fraction in zip(gradients, fractions, strict=True):
        params, state, _ = update(nest(gradient), state, params, fraction)
    return flatten(params), state, optimizer


def reference(directions, start, gradients, fractions, decayed=0.2):
    """Iterate p ← p − rate · (direction + decay · p) in float64, groups spelled out."""
    result = {}
    for path, p in start.items():
        p, direction = p.astype(np.float64), directions(path)
        for t, (gradient, x) in enumerate(zip(gradients, fractions, strict=True), 1):
            rate = RATE[ROLE[path]] * wsd(x)
            decay = 0.0 if ROLE[path] == "scalar" else decayed
            p = p - rate * (direction(t, gradient[path].astype(np.float64), p) + decay * p)
        result[path] = p
    return result


def adam_direction(path):
    m = v = 0.0

    def direction(t, g, p):
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)

    return direction


def lion_direction(path):
    m = 0.0

    def direction(t, g, p):
        nonlocal m
        update, m = np.sign(0.9 * m + 0.1 * g), 0.95 * m + 0.05 * g
        return update

    return direction


def adan_direction(path):
    m = d = n = 0.0
    last = None

    def direction(t, g, p):
        nonlocal m, d, n, last
        difference = 0.0 if last is None else g - last
        m, d = 0.9 * m + 0.1 * g, 0.92 * d + 0.08 * difference
        n = 0.95 * n + 0.05 * (g + 0.08 * difference) ** 2
        last = g
        numerator = m / (1 - 0.9**t) + 0.08 * d / (1 - 0.92**t)
        return numerator / (np.sqrt(n / (1 - 0.95**t)) + 1e-8)

    return direction


def assert_close(got, want, tolerance=TOLERANCE):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=tolerance, err_msg=path)


@pytest.mark.parametrize(
    ("name", "directions"), [("adamw", adam_direction), ("lion", lion_direction), ("adan", adan_direction)]
)
def test_steps_equal_the_recursion_in_float64(name, directions):
    start, gradients = random_flat(0), [random_flat(seed) for seed in range(1, 5)]
    got, _, _ = run(config_of(name), start, gradients, FRACTIONS)
    assert_close(got, reference(directions, start, gradients, FRACTIONS))


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    start, gradients = random_flat(0), [random_flat(seed) for seed in range(1, 11)]
    config = OptimConfig(lr=0.01, beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.1, clip=0.5, schedule="constant")
    got, _, _ = run(config, start, gradients, [0.0] * 10)

    tensors = {path: torch.tensor(x, dtype=torch.float64, requires_grad=True) for path, x in start.items()}
    groups = [
        {"params": [t for p, t in tensors.items() if ROLE[p] != "scalar"], "weight_decay": 0.1},
        {"params": [t for p, t in tensors.items() if ROLE[p] == "scalar"], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-12)
    for gradient in gradients:
        for path, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[path], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 0.5)
        peer.step()
    # torch divides by (norm + 1e-6): 1e-7 of a gradient here.
    assert_close(got, {path: t.detach().numpy() for path, t in tensors.items()})


def adafactor_step(p, g, row, column, v, t):
    """Algorithm 4 of Shazeer & Stern 2018 for one array, without rate; factored for matrices of 128 and more."""
    decay = 1 - t**-0.8
    square = g * g + 1e-30
    if p.ndim == 2 and min(p.shape) >= 128:
        row = decay * row + (1 - decay) * square.mean(1)
        column = decay * column + (1 - decay) * square.mean(0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
    else:
        v = decay * v + (1 - decay) * square
        u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u * u).mean()))
    return u * max(1e-3, np.sqrt((p * p).mean())), row, column, v


def test_adafactor_treats_each_layer_alone():
    shapes = {"embed/token/table": (130, 128), "blocks/mlp/up/kernel": (2, 128, 136), "head/norm/weight": (5,)}
    start, gradients = random_flat(0, shapes), [random_flat(seed, shapes) for seed in (1, 2, 3)]
    start["blocks/mlp/up/kernel"][1] *= 10  # layers of different scale must not share their statistics
    gradients[1]["blocks/mlp/up/kernel"][0] *= 100
    config = OptimConfig(name="adafactor", lr=0.1, weight_decay=0.2, clip=None, schedule="constant")
    got, _, _ = run(config, start, gradients, [0.1, 0.2, 0.3])

    def train(path, index):
        p = start[path][index].astype(np.float64)
        row = column = v = 0.0
        for t, gradient in enumerate(gradients, 1):
            u, row, column, v = adafactor_step(p, gradient[path][index].astype(np.float64), row, column, v, t)
            p = p - 0.1 * (u + (0.0 if path == "head/norm/weight" else 0.2) * p)
        return p

    for path in shapes:
        layers = [0, 1] if path.startswith("blocks") else [...]
        for index in layers:
            # Weights up to 40 here: the float32 rounding scales with them.
            np.testing.assert_allclose(got[path][index], train(path, index), rtol=1e-5, atol=1e-5, err_msg=path)


def test_adafactor_of_a_model_whose_layers_are_all_frozen():
    head = {"head/norm/weight": np.full(5, 3.0, np.float32)}
    config = OptimConfig(name="adafactor", lr=0.1, clip=None, schedule="constant")
    optimizer = make_optimizer(config, {**declared(nest(head)), "blocks": None})
    params = {**nest(head), "blocks": None}
    moved, _, _ = optimizer.update(params, optimizer.init(params), params, 0.5)
    # The first step is the rate times the rms of the weights.
    np.testing.assert_allclose(moved["head"]["norm"]["weight"], 3.0 - 0.1 * 3.0, rtol=1e-5)


def test_schedule_free_follows_the_published_recursion():
    """Defazio et al. 2024, Algorithm 1: AdamW without momentum on z, gradients at y, evaluation at x."""
    start, gradients = random_flat(0), [random_flat(seed) for seed in range(1, 5)]
    got, state, optimizer = run(config_of("schedule_free_adamw"), start, gradients, FRACTIONS)
    evaluated = flatten(optimizer.evaluation_params(nest(got), state))
    for path in SHAPES:
        z = x = y = start[path].astype(np.float64)
        v, weights = 0.0, 0.0
        decay = 0.0 if ROLE[path] == "scalar" else 0.2
        for t, (gradient, fraction) in enumerate(zip(gradients, FRACTIONS, strict=True), 1):
            g = gradient[path].astype(np.float64)
            rate = RATE[ROLE[path]] * wsd(fraction)
            # Weighted by the square of the largest rate so far, which is the peak from the first step on.
            weights += RATE[ROLE[path]] ** 2
            c = RATE[ROLE[path]] ** 2 / weights
            v = 0.95 * v + 0.05 * g * g
            z = z - rate * (g / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * y)
            x = (1 - c) * x + c * z
            y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(got[path], y, atol=TOLERANCE, err_msg=path)
        np.testing.assert_allclose(evaluated[path], x, atol=TOLERANCE, err_msg=path)


def quadratic(params):
    """Its Hessian is diagonal, where Hutchinson's estimate is exact: entry i of a leaf has curvature i mod 5 + 1."""
    return sum(0.5 * jnp.sum(curvature(x.size).reshape(x.shape) * x**2) for x in jax.tree.leaves(params))


def linear(params):
    return sum(jnp.sum(x) for x in jax.tree.leaves(params))


def curvature(size):
    return jnp.arange(size) % 5 + 1.0


def test_sophia_steps_by_the_clipped_ratio_of_momentum_to_curvature():
    start, gradients = random_flat(0), [random_flat(seed) for seed in range(1, 5)]
    gradients = [{path: 1e-3 * g for path, g in gradient.items()} for gradient in gradients]

    def directions(path):
        m = h = 0.0

        def direction(t, g, p):
            nonlocal m, h
            m = 0.9 * m + 0.1 * g
            u = np.clip(m / (1 - 0.9**t) / np.maximum(0.01 * h, 1e-8), -1, 1)
            if t == 1:  # the estimate is renewed every tenth step, after the step
                h = 0.05 * np.asarray(curvature(p.size), np.float64).reshape(p.shape)
            return u

        return direction

    got, _, _ = run(config_of("sophia"), start, gradients, FRACTIONS, objective=quadratic)
    assert_close(got, reference(directions, start, gradients, FRACTIONS))


def test_sophia_differentiates_kernels_with_hand_written_gradients():
    @jax.custom_vjp
    def double(x):
        return 2.0 * x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (double(g),))
    start, gradient = random_flat(0), random_flat(1)
    got, state, _ = run(
        config_of("sophia"), start, [gradient], [0.1], objective=lambda p: quadratic(jax.tree.map(double, p))
    )
    nu = next(x for p, x in flatten(state).items() if "nu/head/norm/weight" in p)
    np.testing.assert_allclose(nu, 0.05 * 4 * curvature(8), rtol=1e-6)


def test_sophia_without_an_objective_says_what_is_missing():
    with pytest.raises(ValueError, match="objective"):
        run(config_of("sophia"), random_flat(0), [random_flat(1)], [0.0])


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_peak_rates(name):
    """The first step of each parameter is that of a single rate of 1, times its group's rate."""
    start, gradient = random_flat(0), random_flat(1)
    got, _, _ = run(config_of(name), start, [gradient], [0.0], quadratic)
    one = config_of(name, lr=1.0, embed_lr=None, head_lr=None, scalar_lr=None)
    unit, _, _ = run(one, start, [gradient], [0.0], quadratic)
    for path in SHAPES:
        rate = RATE[ROLE[path]]
        assert np.any(unit[path] != start[path])
        # A difference of weights of size ~3 is good to a few roundings of 2e-7.
        np.testing.assert_allclose(got[path] - start[path], rate * (unit[path] - start[path]), atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_and_spares_norms_biases_and_scalars(name):
    """Without a gradient, decay alone moves the weights: by 1 − rate · decay."""
    start, none = random_flat(0), {path: np.zeros(s, np.float32) for path, s in SHAPES.items()}
    config = config_of(name, embed_weight_decay=0.5)
    got, _, _ = run(config, start, [none], [0.75], linear)
    for path in SHAPES:
        role = ROLE[path]
        decay = {"scalar": 0.0, "embedding": 0.5}.get(role, 0.2)
        shrunk = start[path] * (1 - RATE[role] * 0.5 * decay)
        np.testing.assert_allclose(got[path], shrunk, rtol=1e-6, atol=1e-6, err_msg=path)


def test_cautious_decay_touches_only_what_the_update_shrinks():
    start, gradient = random_flat(0), random_flat(1)
    plain, _, _ = run(config_of("lion", weight_decay=0.0), start, [gradient], [0.0])
    got, _, _ = run(config_of("lion", cautious_decay=True), start, [gradient], [0.0])
    for path in SHAPES:
        agrees = gradient[path] * start[path] >= 0
        decay = 0.0 if ROLE[path] == "scalar" else 0.2
        want = plain[path] - agrees * RATE[ROLE[path]] * decay * start[path]
        np.testing.assert_allclose(got[path], want, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_bounds_the_global_norm_and_reports_the_norm_before(limit):
    start, gradient = random_flat(0), random_flat(1)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    config = OptimConfig(name="adamw", beta1=0.0, beta2=0.0, eps=1.0, lr=1.0, clip=limit, schedule="constant")
    params = nest(start)
    optimizer = make_optimizer(config, declared(params))
    moved, _, metrics = jax.jit(optimizer.update)(nest(gradient), optimizer.init(params), params, 0.0)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    for path, x in flatten(moved).items():
        g = gradient[path] * min(1.0, limit / norm)  # with β = 0 and ε = 1, Adam's direction is g / (|g| + 1)
        np.testing.assert_allclose(start[path] - x, g / (abs(g) + 1), atol=1e-6)


def test_reported_lr_is_the_matrices():
    params = nest(random_flat(0))
    optimizer = make_optimizer(CONFIG, declared(params))
    _, _, metrics = jax.jit(optimizer.update)(nest(random_flat(1)), optimizer.init(params), params, 0.75)
    np.testing.assert_allclose(metrics["lr"], 0.05, rtol=1e-6)


def test_ema_is_the_weighted_sum_of_the_weights_since_its_start():
    params = nest(random_flat(0))
    optimizer = make_optimizer(OptimConfig(lr=0.1, ema=0.7, ema_start=0.5, schedule="constant"), declared(params))
    state, history, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for step, fraction in enumerate([0.0, 0.3, 0.5, 0.7, 0.9]):
        params, state, _ = update(nest(random_flat(step + 1)), state, params, fraction)
        history.append(flatten(params))
        if fraction < 0.5:
            assert_close(flatten(optimizer.evaluation_params(params, state)), history[-1], 0.0)
    # The average stands at the weights of 0.3, the last step before its start; then three steps are mixed in.
    weights = [0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3]
    want = {p: sum(w * np.float64(h[p]) for w, h in zip(weights, history[1:], strict=True)) for p in SHAPES}
    assert_close(flatten(optimizer.evaluation_params(params, state)), want, 1e-6)


def test_without_averaging_the_weights_themselves_are_evaluated():
    params = nest(random_flat(0))
    optimizer = make_optimizer(OptimConfig(), declared(params))
    assert optimizer.evaluation_params(params, optimizer.init(params)) is params


@pytest.mark.parametrize("name", NAMES)
def test_a_step_compiles_once_trains_and_ends(name):
    params = nest(random_flat(0))
    config = config_of(name, clip=1.0, ema=0.0 if name == "schedule_free_adamw" else 0.9)
    optimizer = make_optimizer(config, declared(params))
    traces = 0

    @jax.jit
    def step(params, state, fraction):
        nonlocal traces
        traces += 1
        return optimizer.update(jax.grad(quadratic)(params), state, params, fraction, objective=quadratic)

    state = jax.jit(optimizer.init)(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    loss = quadratic(params)
    for fraction in np.linspace(0, 0.9, 10, dtype=np.float32):
        params, state, metrics = step(params, state, fraction)
    last = params if name != "schedule_free_adamw" else state.transform[-1].z
    params, state, _ = step(params, state, np.float32(1.0))
    now = params if name != "schedule_free_adamw" else state.transform[-1].z
    assert_close(flatten(now), flatten(last), 0.0)  # the rate is 0 at the end of the budget
    assert traces == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert quadratic(params) < 0.8 * loss
    assert np.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "schedule_free_adamw", "ema": 0.9}, r"ema must be 0.*0\.9"),
        ({"name": "schedule_free_adamw", "beta1": 0.0}, r"beta1 must be above 0 .* got 0"),
        ({"ema": 1.0}, r"ema must be from 0 to below 1, got 1\."),
        ({"clip": 0.0}, r"clip must be above 0, got 0\."),
        ({"name": "muon", "newton_schulz_steps": 0}, "at least 1"),
    ],
)
def test_impossible_optimizers_are_refused(fields, words):
    params = nest(random_flat(0))
    with pytest.raises(ConfigError, match=words):
        make_optimizer(OptimConfig(**fields), declared(params))


def test_muon_groups_step_like_adamw_outside_the_matrices():
    start, gradients = random_flat(0), [random_flat(seed) for seed in range(1, 5)]
    muon, _, _ = run(config_of("muon"), start, gradients, FRACTIONS)
    want = reference(adam_direction, start, gradients, FRACTIONS)
    for path in SHAPES:
        if ROLE[path] != "matrix":
            np.testing.assert_allclose(muon[path], want[path], atol=TOLERANCE, err_msg=path)
        else:
            assert not np.allclose(muon[path], want[path], atol=1e-2)


def test_state_round_trips_through_its_leaves():
    params = nest(random_flat(0))
    optimizer = make_optimizer(config_of("muon", ema=0.9), declared(params))
    state = optimizer.init(params)
    leaves, structure = jax.tree.flatten(state)
    again = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(x)) for x in leaves])
    update = jax.jit(optimizer.update)
    one, two = update(params, state, params, 0.2), update(params, again, params, 0.2)
    assert optax.tree.norm(optax.tree.sub(one[0], two[0])) == 0.0
