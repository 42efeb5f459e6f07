"""The policy of least time: batches are enumerated, and the nine shares of each are a linear program's (HiGHS).

Source: Sheng et al. 2023, arXiv:2303.06865, section 4.3.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from cramjax.serve.offload.cost_model import (
    GROUPS,
    Form,
    Machine,
    Memory,
    Policy,
    Prediction,
    Shares,
    Work,
    divided,
    peak_memory,
    predict,
    prompt_streams,
    step_streams,
)

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of a batch that are tried."""
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Batches of a block that are tried."""
_PATIENCE = 3
"""Larger blocks in a row that are no faster, after which no larger one is tried."""
_TOWARDS_DEVICE = 1e-4
"""Between equals, what is nearer: share of the time of computing that all on the host is taken to cost, and twice that
all on the disk; of cache and activations ten times as much, for they are small and often moved."""


@dataclass(frozen=True)
class Found:
    """A policy, and what it is predicted to take."""

    policy: Policy
    prediction: Prediction
    memory: Memory
    tokens_per_second: float
    """For the prompts there are: those of the last block may be fewer."""


def search(
    work: Work,
    machine_of: Callable[[int], Machine],
    limits: Memory,
    *,
    prompts: int | None = None,
    form: Form = "code",
    batches: tuple[int, ...] = BATCHES,
    counts: tuple[int, ...] = COUNTS,
    finish: Callable[[Policy], Policy] = lambda policy: policy,
) -> Iterator[Found]:
    """The best policy for each size of a batch, those that fit.

    Args:
        work: the model and what is asked of it.
        machine_of: the machine's constants for batches of a size.
        limits: bytes of each tier.
        prompts: how many rows there are. Default: as many as one likes.
        form: how streams overlap.
        batches: sizes of a batch.
        counts: batches of a block.
        finish: makes what can be placed of shares of any size.
    """
    for batch in batches:
        if prompts is not None and batch > prompts and batch > 1:
            return
        machine, best, worse = machine_of(batch), None, 0
        most = counts[-1] if prompts is None else min(counts[-1], math.ceil(prompts / batch))
        for count in (*(n for n in counts if n < most), most):
            found = solve(work, machine, limits, batch, count, prompts=prompts, form=form, finish=finish)
            if found is None:
                break
            worse = 0 if best is None or found.tokens_per_second > best.tokens_per_second else worse + 1
            best = found if worse == 0 else best
            if worse == _PATIENCE:
                break
        if best is not None:
            yield best


def solve(
    work: Work,
    machine: Machine,
    limits: Memory,
    batch: int,
    batches: int,
    *,
    prompts: int | None = None,
    form: Form = "code",
    finish: Callable[[Policy], Policy] = lambda policy: policy,
) -> Found | None:
    """The shares of least time for blocks of one size; None where nothing fits.

    Args:
        work: the model and what is asked of it.
        machine: constants for batches of this size.
        limits: bytes of each tier.
        batch: rows of a batch.
        batches: of a block.
        prompts: how many rows there are.
        form: how streams overlap.
        finish: as of `search`.
    """
    nothing = Shares(0.0, 0.0, 0.0)
    bare = Policy(batch, batches, nothing, nothing, nothing)
    at_none, at_each = (0.0,) * 9, np.eye(9)

    def affine(of: Callable[[Policy], float]) -> tuple[np.ndarray, float]:
        """Coefficients of the nine shares, and what is there without them."""
        base = of(divided(bare, at_none))
        return np.array([of(divided(bare, tuple(share))) - base for share in at_each]), base

    rows, bounds = [], []
    for part, (streams, groups) in enumerate(zip((prompt_streams, step_streams), GROUPS[form], strict=True)):
        for group in groups:  # the seconds of a layer, the variables after the shares, are at least those of each group
            slope, base = affine(lambda p, s=streams, g=(group,): s(work, machine, p).together(g))
            rows.append([*slope, -1.0 * (part == 0), -1.0 * (part == 1)])
            bounds.append(-base)
    for tier in ("device", "host", "disk"):
        slope, base = affine(lambda p, t=tier: getattr(peak_memory(work, p), t))
        limit, scale = getattr(limits, tier), max(1.0, abs(base), np.abs(slope).max())
        if math.isfinite(limit):
            rows.append([*(slope / scale), 0.0, 0.0])
            bounds.append((limit - base) / scale)
    whole = np.kron(np.eye(3), np.ones(3))
    steps = max(work.output - 1, _TOWARDS_DEVICE)
    computing = prompt_streams(work, machine, bare).compute + steps * step_streams(work, machine, bare).compute
    near = np.kron([1.0, 10.0, 10.0], [0.0, 1.0, 2.0]) * _TOWARDS_DEVICE
    solved = linprog(
        [*near, 1.0 / computing, steps / computing],
        A_ub=np.array(rows),
        b_ub=np.array(bounds),
        A_eq=np.hstack([whole, np.zeros((3, 2))]),
        b_eq=np.ones(3),
        bounds=[(0.0, 1.0)] * 9 + [(0.0, None)] * 2,
        method="highs",
    )
    if not solved.success:
        return None
    policy = finish(divided(bare, tuple((np.clip(solved.x[:9], 0.0, 1.0) + 0.0).tolist())))
    return found_of(work, machine, policy, prompts=prompts, form=form)


def least_device(work: Work, limits: Memory, batch: int) -> float:
    """The least memory of the device for which anything fits, with one batch of so many rows; infinite: none is enough.

    Args:
        work: the model and what is asked of it.
        limits: bytes of each tier; that of the device is not read.
        batch: rows.
    """
    nothing = Shares(0.0, 0.0, 0.0)
    bare = Policy(batch, 1, nothing, nothing, nothing)
    base = peak_memory(work, divided(bare, (0.0,) * 9))
    each = [peak_memory(work, divided(bare, tuple(share))) for share in np.eye(9)]
    within = ("host", "disk")
    solved = linprog(
        [(own.device - base.device) / 2**20 for own in each],
        A_ub=[[(getattr(own, tier) - getattr(base, tier)) / 2**20 for own in each] for tier in within],
        b_ub=[(getattr(limits, tier) - getattr(base, tier)) / 2**20 for tier in within],
        A_eq=np.kron(np.eye(3), np.ones(3)),
        b_eq=np.ones(3),
        bounds=[(0.0, 1.0)] * 9,
        method="highs",
    )
    return solved.fun * 2**20 + base.device if solved.success else math.inf


def found_of(work: Work, machine: Machine, policy: Policy, *, prompts: int | None = None, form: Form = "code") -> Found:
    """A policy with what it takes; arguments as of `solve`."""
    prediction = predict(work, machine, policy, form)
    blocks = 1 if prompts is None else math.ceil(prompts / policy.rows)
    rows = policy.rows if prompts is None else prompts
    speed = rows * work.output / (blocks * prediction.seconds)
    return Found(policy, prediction, peak_memory(work, policy), speed)
