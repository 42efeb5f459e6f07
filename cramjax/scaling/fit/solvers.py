"""Two ways to the best coefficients of the law: variable projection, and L-BFGS from the published grid of starts.

Variable projection needs no starts: for given exponents the law is linear in E, A and B, so a grid over the two
exponents sees the whole landscape. L-BFGS is approach 3 of Hoffmann et al. 2022, kept to compare with.
"""

from itertools import combinations, product

import numpy as np

from cramjax.scaling.fit.law import Array, Law, huber, minimise

_EXPONENTS = np.geomspace(0.02, 2.5, 16)
_GRID_ROWS = 1000
_SUBSETS = [list(subset) for size in (1, 2, 3) for subset in combinations(range(3), size)]


def variable_projection(law: Law, *, sweeps: int = 8, polished: int = 24) -> Array:
    """The best coefficients (E, a, b, α, β), from a grid over α and β.

    In each cell E, A and B solve a non-negative weighted linear least-squares problem, reweighted until it is the Huber
    loss of log L. The lowest cells are then polished by Newton steps in all five coefficients.

    Args:
        law: the table.
        sweeps: reweightings in each cell.
        polished: how many of the grid's lowest local minima are polished.
    """
    alpha, beta = (grid.ravel() for grid in np.meshgrid(_EXPONENTS, _EXPONENTS, indexing="ij"))
    every = -(-len(law.x) // _GRID_ROWS)  # some rows of a long table are enough to see where the minima are
    linear = project(law.part(every), alpha, beta, sweeps)
    with np.errstate(divide="ignore"):
        theta = np.stack([linear[:, 0], np.log(linear[:, 1]), np.log(linear[:, 2]), alpha, beta], -1)
    theta = np.clip(theta, [0, -50, -50, 0, 0], [np.inf, 50, 50, np.inf, np.inf])
    value = law.objective(theta).reshape(len(_EXPONENTS), -1)
    padded = np.pad(value, 1, constant_values=np.inf)
    around = [padded[1 + i : 1 + i + len(value), 1 + j : 1 + j + len(value)] for i, j in product((-1, 0, 1), repeat=2)]
    minima = np.flatnonzero(value.ravel() <= np.min(around, 0).ravel())
    lowest = np.argsort(value.ravel())[:polished]
    chosen = np.unique(np.concatenate([minima[np.argsort(value.ravel()[minima])][:polished], lowest]))
    found = minimise(law, theta[chosen])
    return found[np.argmin(law.objective(found))]


def project(law: Law, alpha: Array, beta: Array, sweeps: int) -> Array:
    """E and the two terms at the mean row that fit best for given exponents: [problem, 3], none negative.

    Args:
        law: the table.
        alpha: exponents of size [problem].
        beta: exponents of tokens [problem].
        sweeps: reweightings.
    """
    columns = np.stack(
        [
            np.ones((len(alpha), len(law.x))),
            np.exp(np.clip(-alpha[:, None] * law.x, -300, 300)),
            np.exp(np.clip(-beta[:, None] * law.z, -300, 300)),
        ],
        -1,
    )
    loss = np.exp(law.log_loss)
    predicted = np.broadcast_to(loss, columns.shape[:2])
    size = np.zeros_like(predicted)
    linear = np.zeros((len(alpha), 3))
    for _ in range(sweeps):
        # log L − log(law) ≈ (target − new law) / law, linearised where the last sweep ended
        target = predicted * (1 + law.log_loss - np.log(predicted))
        weights = np.minimum(1.0, law.delta / np.maximum(size, 1e-300)) / predicted**2
        linear = _non_negative(columns, target, weights)
        predicted = np.maximum((columns @ linear[:, :, None])[:, :, 0], 1e-3 * loss)
        size = np.abs(law.log_loss - np.log(predicted))
    return linear


def _non_negative(columns: Array, target: Array, weights: Array) -> Array:
    """Weighted least squares with three non-negative coefficients: every choice of positive ones is tried."""
    root = np.sqrt(weights)
    scaled, wanted = columns * root[:, :, None], target * root
    norm = np.sqrt((scaled**2).sum(1))
    scaled = scaled / norm[:, None, :]
    normal = scaled.transpose(0, 2, 1) @ scaled + 1e-14 * np.eye(3)
    right = (scaled * wanted[:, :, None]).sum(1)
    best = np.full(len(columns), np.inf)
    out = np.zeros((len(columns), 3))
    for subset in _SUBSETS:
        part = np.linalg.solve(normal[:, subset][:, :, subset], right[:, subset][:, :, None])[:, :, 0]
        gain = -(part * right[:, subset]).sum(-1)
        better = (part >= 0).all(-1) & (gain < best)
        best = np.where(better, gain, best)
        candidate = np.zeros_like(out)
        candidate[:, subset] = part
        out = np.where(better[:, None], candidate, out)
    return out / norm


PUBLISHED_STARTS = np.array(
    list(
        product(
            np.arange(0, 26, 5.0),  # a = log A
            np.arange(0, 26, 5.0),  # b = log B
            np.arange(-1, 1.1, 0.5),  # e = log E
            np.arange(0, 2.1, 0.5),  # α
            np.arange(0, 2.1, 0.5),  # β
        )
    )
)
"""Rows (a, b, e, α, β) of the grid in Hoffmann et al. 2022, appendix D.3."""


def lbfgs(law: Law, starts: Array | None = None, *, scouting: int = 60, kept: int = 64) -> Array:
    """The best coefficients (E, a, b, α, β) that L-BFGS reaches from a grid of starts, with exact gradients.

    All starts run side by side; after `scouting` iterations the best of them go on until they move no more.

    Args:
        law: the table.
        starts: rows (log A, log B, log E, α, β). Default: the published 4500.
        scouting: iterations of every start.
        kept: how many go on.
    """
    points = np.array(PUBLISHED_STARTS if starts is None else starts)
    points, values = _descend(law, points, scouting)
    points, values = _descend(law, points[np.argsort(values)[:kept]], 2000)
    a, b, e, alpha, beta = points[np.argmin(values)]
    return law.centred(np.array([np.exp(e), np.exp(a), np.exp(b), alpha, beta]))


def _descend(law: Law, points: Array, iterations: int, memory: int = 12) -> tuple[Array, Array]:
    """L-BFGS with halving steps on many problems at once."""
    values, gradients = _value_and_gradient(law, points)
    moves: list[Array] = []
    turns: list[Array] = []
    still = np.zeros(len(points), dtype=int)
    for _ in range(iterations):
        direction = -_inverse_hessian_product(gradients, moves, turns)
        slope = (direction * gradients).sum(-1)
        uphill = slope >= 0
        direction[uphill], slope[uphill] = -gradients[uphill], -(gradients[uphill] ** 2).sum(-1)
        longest = 1.0 if moves else 0.1
        length = np.minimum(1.0, longest * 5 / np.maximum(np.abs(direction).max(-1), 1e-300))
        new_points, new_values, new_gradients = points.copy(), values.copy(), gradients.copy()
        trying = np.flatnonzero(still < 5)
        for _ in range(30):
            there = points[trying] + length[trying, None] * direction[trying]
            value, gradient = _value_and_gradient(law, there)
            good = value <= values[trying] + 1e-4 * length[trying] * slope[trying]
            done = trying[good]
            new_points[done], new_values[done], new_gradients[done] = there[good], value[good], gradient[good]
            trying = trying[~good]
            if len(trying) == 0:
                break
            length[trying] *= 0.5
        still = np.where(values - new_values > 1e-12 * np.abs(values), 0, still + 1)
        moves = [*moves, new_points - points][-memory:]
        turns = [*turns, new_gradients - gradients][-memory:]
        points, values, gradients = new_points, new_values, new_gradients
        if (still >= 5).all():
            break
    return points, values


def _inverse_hessian_product(gradients: Array, moves: list[Array], turns: list[Array]) -> Array:
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4); pairs without positive curvature are passed over."""
    q = gradients.copy()
    curvature = [(s * y).sum(-1) for s, y in zip(moves, turns, strict=True)]
    usable = [c > 1e-12 * (y**2).sum(-1) for c, y in zip(curvature, turns, strict=True)]
    rho = [np.where(ok, 1 / np.where(ok, c, 1.0), 0.0) for c, ok in zip(curvature, usable, strict=True)]
    alphas = []
    for s, y, r in zip(reversed(moves), reversed(turns), reversed(rho), strict=True):
        alphas.append(r * (s * q).sum(-1))
        q -= alphas[-1][:, None] * y
    scale = np.ones(len(q))
    for y, c, ok in zip(turns, curvature, usable, strict=True):  # the newest usable pair has the last word
        scale = np.where(ok, c / np.where(ok, (y**2).sum(-1), 1.0), scale)
    q *= scale[:, None]
    for s, y, r, a in zip(moves, turns, rho, reversed(alphas), strict=True):
        q += s * (a - r * (y * q).sum(-1))[:, None]
    return q


def _value_and_gradient(law: Law, points: Array) -> tuple[Array, Array]:
    """The Huber objective and its gradient in (log A, log B, log E, α, β)."""
    a, b, e, alpha, beta = (points[:, i : i + 1] for i in range(5))
    logs = np.stack(
        [a - alpha * law.log_params, b - beta * law.log_tokens, np.broadcast_to(e, (len(points), len(law.x)))], -1
    )
    top = logs.max(-1)
    shares = np.exp(logs - top[:, :, None])
    total = shares.sum(-1)
    shares /= total[:, :, None]
    residuals = law.log_loss - (top + np.log(total))
    slope = -np.clip(residuals, -law.delta, law.delta)
    by = slope[:, :, None] * shares
    gradient = np.stack(
        [
            by[:, :, 0].sum(-1),
            by[:, :, 1].sum(-1),
            by[:, :, 2].sum(-1),
            -(by[:, :, 0] @ law.log_params),
            -(by[:, :, 1] @ law.log_tokens),
        ],
        -1,
    )
    return huber(residuals, law.delta).sum(-1), gradient
