"""How an implementation is chosen, what the row kernels refuse, and what is left without Triton."""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import devices
from cramjax.errors import ConfigError
from cramjax.kernels import rows
from cramjax.kernels.activation import activate
from cramjax.kernels.attention import api, attention
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.choice import Implementation, choose, never
from cramjax.kernels.cross_entropy.softmax import SoftmaxRule, softmax_loss
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.kernels.norm import normalise

# Refuses what is odd.
_PICKY = Implementation("picky", lambda x: -x, lambda x: f"{x} is odd" if x % 2 else None)
_ANY = Implementation("any", lambda x: x, never)


def test_the_first_that_does_not_refuse_is_chosen() -> None:
    assert choose("sum", (_PICKY, _ANY), None, 4) is _PICKY
    assert choose("sum", (_PICKY, _ANY), None, 5) is _ANY
    assert choose("sum", (_PICKY, _ANY), "any", 4) is _ANY


def test_a_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for number in (7, 7, 9, 7):
            choose("product", (_PICKY, _ANY), None, number)
        choose("product", (_PICKY, _ANY), "any", 11)  # nobody asked the first
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"product: not picky, because {number} is odd" for number in (7, 9)]


def test_one_that_is_asked_for_must_be_known_and_run() -> None:
    with pytest.raises(ConfigError, match="There is no sum implementation 'fast': choose from picky, any"):
        choose("sum", (_PICKY, _ANY), "fast", 4)
    with pytest.raises(ConfigError, match="Sum implementation 'picky' cannot run here: 5 is odd"):
        choose("sum", (_PICKY, _ANY), "picky", 5)


_A100 = devices.Target("gpu", "NVIDIA A100-SXM4-40GB", "8.0")


@pytest.mark.parametrize(
    ("target", "shape", "dtype", "width", "reason"),
    [
        (_A100, (2, 8), "bfloat16", 8, None),
        (_A100, (2, 8), "float16", 16384, None),
        (devices.Target("gpu", "NVIDIA H100 80GB HBM3", "9.0"), (1, 1), "float32", 1, None),
        (devices.Target("gpu", "a new card", "12.0"), (1, 1), "float32", 1, None),
        (devices.Target("cpu", "cpu", None), (2, 8), "float32", 8, "for NVIDIA GPUs and this is a cpu"),
        (devices.Target("tpu", "TPU v4", None), (2, 8), "float32", 8, "for NVIDIA GPUs and this is a tpu"),
        (devices.Target("gpu", "Tesla T4", "7.5"), (2, 8), "float32", 8, "capability 8.0, and Tesla T4 has 7.5"),
        (devices.Target("gpu", "a card", None), (2, 8), "float32", 8, "capability 8.0, and a card has None"),
        (devices.Target("gpu", "AMD", "gfx90a"), (2, 8), "float32", 8, "capability 8.0, and AMD has gfx90a"),
        (_A100, (2, 8), "float8_e4m3fn", 8, "float32, bfloat16 and float16, not float8_e4m3fn"),
        (_A100, (2, 16385), "float32", 16385, "at most 16384 columns, not 16385"),
        (_A100, (0, 8), "float32", 8, r"nothing to compute in shape \(0, 8\)"),
    ],
)
def test_row_kernels_say_what_they_do_not_take(
    target: devices.Target,
    shape: tuple[int, ...],
    dtype: str,
    width: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "target", lambda: target)
    got = rows.refusal(jnp.zeros(shape, dtype), width)
    assert got == reason or (got and reason and re.search(reason, got))


_X = jnp.linspace(-1.0, 1.0, 2 * 4 * 2 * 8).reshape(2, 4, 2, 8)
_TARGETS, _ONES = jnp.zeros(8, jnp.int32), jnp.ones(8)

_KERNELS: dict[str, Callable[..., Any]] = {
    "attention": lambda **choice: attention(_X, _X, _X, causal=True, **choice),
    "norm": lambda **choice: normalise(_X, centred=True, eps=1e-5, **choice),
    "heads": lambda **choice: normalise_and_rotate(_X, 1, eps=1e-5, **choice),
    "activation": lambda **choice: activate("geglu", _X, **choice),
    "softmax": lambda **choice: softmax_loss(
        SoftmaxRule(None, 0.0, 16), _X.reshape(8, 16), None, _TARGETS, _ONES, **choice
    ),
}


@pytest.mark.parametrize("kernel", _KERNELS)
@pytest.mark.usefixtures("on_an_h100")
def test_without_triton_all_is_computed_as_before(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = _KERNELS[kernel]
    wanted = compute(implementation="pallas")
    monkeypatch.setattr("cramjax.kernels.triton.triton", None)
    for got in (compute(), compute(implementation="xla")):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got, wanted)
    with pytest.raises(ConfigError, match="'pallas' cannot run here: this jax has no Triton lowering of Pallas"):
        compute(implementation="pallas")


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "cudnn"), ("float32", "xla")])
def test_without_triton_attention_is_left_to_others(dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cramjax.kernels.triton.triton", None)
    monkeypatch.setattr(devices, "target", lambda: _A100)
    x = jnp.zeros((1, 4, 1, 64), dtype)
    assert choose("attention", api._ordered(x, x, Mask(causal=True)), None, x, x, Mask(causal=True), None).name == name
