"""Ahead-of-time compilation for GPUs: its bytes against arithmetic, and its messages."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cramjax import devices
from cramjax.errors import ConfigError
from cramjax.planning import GPUS, compile_for, missing, targets

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@needs_compiler
@pytest.mark.parametrize("target", GPUS)
def test_device_bytes_are_arguments_and_outputs_less_what_is_donated(target: str) -> None:
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    kept = compile_for(target, lambda x: x + 1, x)
    donated = compile_for(target, lambda x: x + 1, x, donate=(0,))
    assert (kept.arguments, kept.outputs, kept.aliases) == (4 << 20, 4 << 20, 0)
    assert donated.aliases == 4 << 20
    assert kept.device_bytes - donated.device_bytes == 4 << 20


@needs_compiler
def test_too_much_shared_memory_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from cramjax.kernels.attention import attention, pallas
    from cramjax.kernels.attention.tiles import Tile, Tiles

    large = Tile(128, 128, 8, 4)
    monkeypatch.setattr(pallas, "choose_tiles", lambda *_: Tiles(large, large, large))
    x = jax.ShapeDtypeStruct((1, 1024, 1, 128), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_for("rtx-4090", lambda x: attention(x, x, x, causal=True), x)


@pytest.mark.parametrize("target", GPUS)
def test_a_target_is_what_functions_are_traced_for(target: str) -> None:
    gpu = GPUS[target]
    with targets.tracing_for(gpu):
        seen = devices.target()
    assert seen.platform == "gpu" and seen.ahead_of_time and seen.kind.startswith(gpu.name)
    assert seen.capability == ".".join(map(str, gpu.capability))
    assert devices.target().platform == "cpu"


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no device 'gtx-1080'.*It has cpu, t4, v100-16gb, "):
        compile_for("gtx-1080", lambda x: x, jnp.zeros(3))


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "missing", lambda: "nvidia.cuda_nvcc is not installed")
    targets.devices_of.cache_clear()
    with pytest.raises(
        ConfigError, match=r'nvidia.cuda_nvcc is not installed. Install with pip install "cramjax\[aot\]"'
    ):
        compile_for("h100", lambda x: x, jnp.zeros(3))


@needs_compiler
@pytest.mark.slow
def test_a_plan_is_compiled_where_jax_finds_no_gpu_by_itself() -> None:
    # As a user's shell has it: nothing says that the CPU is to be used.
    words = ["plan", "quickstart", "--device", "l4", "--exact", "--model.layers=1", "--batch.size=8"]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    result = subprocess.run(
        [sys.executable, "-m", "cramjax.cli", *words], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and "Compiler: " in result.stdout, result.stderr
