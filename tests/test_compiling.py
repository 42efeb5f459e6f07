"""XLA's options: which a program gets, and that XLA takes and heeds them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cramjax import compiling
from cramjax.compiling import Options, compiler_options, device_options, jit
from cramjax.devices import Target
from cramjax.planning import compile_for, missing, targets

H100 = Target("gpu", "NVIDIA H100 80GB HBM3", "9.0")
DESCRIBED = Target("gpu", "NVIDIA H100 80GB HBM3", "9.0", ahead_of_time=True)
SECONDS = [None, 45.0, 86400.0]
ALL = [compiler_options(target, seconds=seconds) for target in (H100, DESCRIBED) for seconds in SECONDS]

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("seconds", SECONDS)
def test_other_devices_keep_their_defaults(platform: str, seconds: float | None) -> None:
    assert compiler_options(Target(platform, "its name", None), seconds=seconds) == {}


def test_a_short_run_tunes_nothing_and_a_long_one_everything() -> None:
    tuning = {"xla_gpu_autotune_level", "xla_gpu_experimental_enable_fusion_autotuner", "xla_gpu_enable_triton_gemm"}
    for seconds in (None, 600.0, 86400.0):
        assert not tuning & set(compiler_options(H100, seconds=seconds))
    for seconds in (45.0, 60.0, 300.0, compiling.BRIEF):
        chosen = compiler_options(H100, seconds=seconds)
        assert {chosen[name] for name in tuning} == {0}  # that is False, too
        assert compiler_options(H100).items() <= chosen.items()


def test_graphs_are_left_to_xla() -> None:
    # Its own list leaves device-side loops out; no card has run them here.
    assert not any("command_buffer" in name or "graph" in name for options in ALL for name in options)


def test_a_programs_budget_counts_if_it_is_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "target_of", lambda _: H100)
    device = jax.devices()[0]
    assert device_options(device, "1min") == compiler_options(H100, seconds=60.0)
    for budget in ("1d", "50steps", "1Mtok", "1e12flop"):
        assert device_options(device, budget) == compiler_options(H100)


def test_what_a_user_sets_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "target_of", lambda _: H100)
    whole = device_options(jax.devices()[0], "1d")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_gpu_dot_merger_threshold_mb=32 --xla_gpu_autotune_level=2")
    left = device_options(jax.devices()[0], "1min")
    assert set(whole) - set(left) == {"xla_gpu_dot_merger_threshold_mb"}
    assert "xla_gpu_autotune_level" not in left and "xla_gpu_enable_triton_gemm" in left


def _compile(options: Options, monkeypatch: pytest.MonkeyPatch, function: Any, *shapes: jax.ShapeDtypeStruct) -> str:
    monkeypatch.setattr(targets, "compiler_options", lambda _: options)
    return compile_for("h100", function, *shapes).text


@needs_compiler
@pytest.mark.parametrize("options", ALL, ids=str)
def test_xla_takes_every_option(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def steps(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x)

    assert "ENTRY" in _compile(options, monkeypatch, steps, x)


@needs_compiler
@pytest.mark.parametrize("name", sorted({name for options in ALL for name in options}))
def test_xla_reads_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An option that it did not know, or did not parse, would be taken for what it is not.
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    for options, message in (({name: "nonsense"}, name), ({name + "_": 0}, "No such compile option")):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
            _compile(options, monkeypatch, lambda x: x @ x, x)


@needs_compiler
def test_products_of_one_input_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    w = [jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)] * 3

    def three(x: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return x @ a, x @ b, x @ c

    def products(options: Options) -> int:
        return len(re.findall(r'custom_call_target="__cublas', _compile(options, monkeypatch, three, x, *w)))

    cublas: Options = {"xla_gpu_enable_triton_gemm": False}
    assert products(cublas) == 1  # XLA's default: merged, and cut again
    assert products(compiler_options(DESCRIBED)) == 3
    assert products(compiler_options(H100, seconds=45.0)) == 3


@needs_compiler
def test_a_short_run_asks_for_cublas_heuristics(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    text = _compile(compiler_options(H100, seconds=45.0), monkeypatch, lambda x: jnp.tanh(x @ x), x)
    assert "__cublas$lt$matmul" in text and "__triton_gemm" not in text
    assert set(re.findall(r'"selected_algorithm":"(\d+)"', text)) <= {"0"}  # the heuristic's first


def test_a_program_is_compiled_for_the_device_of_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float | None]] = []

    def options(target: Target, *, seconds: float | None = None) -> Options:
        asked.append((target.platform, seconds))
        return {"xla_cpu_enable_fast_math": False}

    monkeypatch.setattr(compiling, "compiler_options", options)

    def double(x: jax.Array, times: int) -> jax.Array:
        """Twice as much."""
        return 2 * times * x

    doubled = jit(double, seconds=7.0, static_argnames="times")
    assert not asked and doubled.__doc__ == "Twice as much."
    assert float(doubled(jnp.float32(3), times=2)) == float(doubled(jnp.float32(3), times=2)) == 12
    assert asked == [("cpu", 7.0)]
