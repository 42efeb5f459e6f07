"""What every test runs on: eight virtual CPU devices, array shapes checked as annotated, and a tiny corpus."""

import dataclasses
import functools
import gc
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Before jax is imported:
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Compiled programs are kept between test sessions: most of the suite's time is compilation.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"cramjax-tests-xla-{os.getuid()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from jaxtyping import install_import_hook

# The modules whose signatures state shapes; every call then checks them (an int passes for a float, as in PEP 484).
install_import_hook(
    ["cramjax.kernels", "cramjax.model", "cramjax.optim"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

_WORDS = "the stack walks block by block and every token pays for its own place in the budget of one long day".split()


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the session's own, so that tests neither use nor leave anything in the user's."""
    import jax

    from cramjax import devices  # after the import hook

    path = tmp_path_factory.mktemp("cache")
    os.environ["CRAMJAX_CACHE"] = str(path)
    # Peaks that are measured while other tests run would not be kept, and be measured again by every process.
    wide = any(name in devices._cpu_info("flags") for name in ("avx512_bf16", "amx_bf16"))
    peaks = {"float32": 1e11, "bfloat16": 2e11 if wide else 1e11, "bandwidth": 1e10}
    known = {devices.describe(jax.local_devices(backend="cpu")[0]): peaks}
    (path / "cpu_peaks.json").write_text(json.dumps(known), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Forget programs before there are too many: Linux gives a process 65,530 mappings of memory, each compiled program
    takes some, and without them the compiler crashes.
    """
    yield
    import jax

    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 40 small English-like text files, 100 kB in all, no two alike."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = [_WORDS[(number * 7 + i * i + i // 11) % len(_WORDS)] for i in range(500)]
        (directory / f"{number:02}.txt").write_text(f"document {number}: {' '.join(words)}\n", encoding="utf-8")
    return directory


_ROW_KERNELS = ("norm.api", "heads.api", "activation.api", "cross_entropy.softmax")


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as if for an H100, with its kernels in Pallas as plain operations, which run here."""
    from cramjax import devices  # after the import hook
    from cramjax.kernels.attention import api as attention

    def interpreted(each: Any) -> Any:
        if each.name != "pallas":
            return each
        return dataclasses.replace(each, compute=functools.partial(each.compute, interpret=True))

    for name in _ROW_KERNELS:
        module = importlib.import_module(f"cramjax.kernels.{name}")
        monkeypatch.setattr(module, "IMPLEMENTATIONS", tuple(map(interpreted, module.IMPLEMENTATIONS)))
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "pallas", interpreted(attention.IMPLEMENTATIONS["pallas"]))
    # Ahead of time: cuDNN, which cannot run here, refuses then.
    h100 = devices.Target("gpu", "NVIDIA H100 80GB HBM3", "9.0", ahead_of_time=True)
    monkeypatch.setattr(devices, "target", lambda: h100)


@pytest.fixture(scope="session")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The benchmarks `hlo_traffic` and `step_bytes`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
        yield importlib.import_module("hlo_traffic"), importlib.import_module("step_bytes")
