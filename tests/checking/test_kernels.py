"""Kernels are checked against their definition: what is right passes, what is wrong is found, what refuses says why."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.checking.cases import KERNELS, Case, Sizes, dense_cases, sizes_for
from cramjax.checking.kernels import Row, check_kernels, in_turns, limit_for
from cramjax.errors import ConfigError

_TINY = Sizes(batch=2, seq=48, encoder_batch=2, encoder_seq=16, heads=4, head_dim=8, mlp=64, vocab=128)


def _told(what: str, done: int, total: int) -> None:
    assert what and 0 <= done < total


def _twice(implementation: str, x: Any) -> Any:
    match implementation:
        case "broken":
            return 2.1 * x
        case "flat":  # right, but for its gradient
            return 2 * jax.lax.stop_gradient(x)
        case "poisoned":
            return 2 * x + jnp.nan
        case "picky":
            raise ConfigError("Twice implementation 'picky' cannot run here: it is Monday.")
        case "unfinished":
            raise NotImplementedError("no lowering\nof this")
    return 2 * x


def _check(*implementations: str, dtypes: Sequence[str] = ("float32",), **changes: Any) -> list[Row]:
    case = Case("twice", _twice, lambda x: 2.0 * x, {"x": (4, 8)}, implementations=implementations, timed=True)
    return check_kernels({"scale": [dataclasses.replace(case, **changes)]}, dtypes, _told)


@pytest.mark.slow
def test_every_kernel_of_the_table_is_right_on_tiny_shapes() -> None:
    rows = check_kernels({name: cases(_TINY) for name, cases in KERNELS.items()}, ["float32"], _told)
    assert {row.kernel for row in rows} == set(KERNELS)
    computed = [row for row in rows if row.errors is not None]
    assert all(not row.wrong and row.error < 1e-5 for row in computed)
    assert all({name[0] for name in row.errors} == {"o", "d"} for row in computed)  # outputs and gradients
    by_name = {(row.kernel, row.case): row.errors for row in computed}
    assert set(by_name["attention", "grouped heads"]) == {"output", "dq", "dk", "dv"}
    assert set(by_name["heads", "grouped heads"]) == {"output 0", "output 1", "dx"}
    assert set(by_name["cross-entropy", "token weights, bias"]) == {"output", "dhidden", "dweight", "dbias"}
    # The kernels of GPUs refuse a CPU.
    assert {row.implementation for row in rows if row.refusal} == {"pallas", "cudnn"}


def test_bfloat16_errors_are_those_of_its_rounding() -> None:
    row = check_kernels({"dense": dense_cases(_TINY)[:1]}, ["bfloat16"], _told)[0]
    # A uniformly distributed mantissa is rounded by 2^-9 at the most, and by about a third of that in the mean square.
    assert 2**-9 / 4 < row.errors["output"] < 2**-9


def test_an_error_is_relative_to_the_norm_of_the_reference() -> None:
    right, broken = _check("plain", "broken")
    assert right.error == 0 and not right.wrong
    # 2.1 x for 2 x, and so its gradient.
    assert broken.errors == pytest.approx({"output": 0.05, "dx": 0.05}, rel=1e-5)
    assert broken.wrong and not broken.chosen and right.chosen


@pytest.mark.parametrize(("implementation", "output", "gradient"), [("flat", 0.0, 1.0), ("poisoned", np.nan, 0.0)])
def test_a_wrong_gradient_and_a_nan_are_wrong(implementation: str, output: float, gradient: float) -> None:
    (row,) = _check(implementation)
    assert row.errors == pytest.approx({"output": output, "dx": gradient}, nan_ok=True)
    assert row.wrong


def test_what_refuses_is_a_row_with_its_reason_and_the_next_is_chosen() -> None:
    picky, plain, broken = _check("picky", "plain", "broken")
    assert picky.refusal == "it is Monday" and picky.errors is None and not picky.wrong and not picky.chosen
    assert plain.chosen and not broken.chosen


def test_what_fails_is_wrong_and_ends_nothing_else() -> None:
    unfinished, plain = _check("unfinished", "plain")
    assert unfinished.failure == "NotImplementedError: no lowering" and unfinished.wrong
    assert plain.errors is not None and not plain.wrong
    assert unfinished.chosen  # a run would get it: it does not refuse


def test_timed_cases_are_checked_in_every_precision_and_the_others_in_the_first() -> None:
    both = _check("plain", dtypes=("bfloat16", "float32"))
    assert [row.dtype for row in both] == ["bfloat16", "float32"] and all(row.seconds > 0 for row in both)
    (one,) = _check("plain", dtypes=("bfloat16", "float32"), timed=False)
    assert one.dtype == "bfloat16" and one.seconds is None


def test_limits_say_what_rounds() -> None:
    case = dense_cases(_TINY)[0]
    elementwise = dataclasses.replace(case, products=False)
    assert limit_for(case, "float32", "gpu").error > limit_for(elementwise, "float32", "gpu").error
    assert limit_for(case, "float32", "cpu") == limit_for(elementwise, "float32", "gpu")
    # Half of the last of a mantissa's bits: 8 of bfloat16, 11 of TF32, 24 of float32.
    for dtype, platform, bits in (("bfloat16", "cpu", 8), ("float32", "gpu", 11), ("float32", "cpu", 24)):
        assert limit_for(case, dtype, platform).error > 2.0 ** -(bits + 1)


def test_sizes_are_the_recipes_where_the_float32_logits_fit() -> None:
    assert sizes_for("gpu", 80 << 30, quick=False) == Sizes()
    for gib in (6, 8, 12, 16, 24, 36, 40, 80):
        sizes = sizes_for("gpu", gib << 30, quick=False)
        # As much as the reference takes: logits, their softmax, and gradients.
        assert 6 * 4 * sizes.tokens * sizes.vocab < gib << 30
        assert (sizes.heads, sizes.head_dim, sizes.vocab) == (12, 64, 50304)


def test_times_are_medians_of_a_call() -> None:
    clock = {"fast": 0, "slow": 0}

    def call(name: str) -> Callable[[], jax.Array]:
        def run() -> jax.Array:
            clock[name] += 1
            return np.sum(np.sort(np.random.default_rng(0).random(1000 if name == "fast" else 200_000)))

        return run

    found = in_turns({name: call(name) for name in clock}, seconds=0.01)
    assert 0 < 10 * found["fast"] < found["slow"]
    assert clock["fast"] > clock["slow"] >= 4
