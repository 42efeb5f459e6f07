"""Starting JAX: what is said of a GPU that cannot be used, in place of JAX's own words."""

import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax import start as starting
from cramjax.cli import main
from cramjax.errors import ConfigError
from cramjax.notices import nvidia_card
from cramjax.start import gpu_trouble, memory_fraction, too_old

jax_runs = starting._jax_runs

# As reported to JAX's own issues (17217, 19605, 10830, 15961, 24866, 28376, 22703, 25315) or said by its plugin here.
TEXTS = {
    "another process holds its memory": (
        "CUDA backend failed to initialize: INTERNAL: no supported devices found for platform CUDA.",
        "failed initializing StreamExecutor for CUDA device ordinal 0: INTERNAL: failed call to "
        "cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY: out of memory; total memory reported: 34089730048",
        "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
    ),
    "its driver does not fit": (
        "RuntimeError: jaxlib/cuda/versions_helpers.cc:38: operation cudaRuntimeGetVersion(&version) failed: CUDA "
        "driver version is insufficient for CUDA runtime version",
        "kernel version 470.182.3 does not match DSO version 520.61.5 -- cannot find working devices in this "
        "configuration",
        "failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: system "
        "has unsupported display driver / cuda driver combination",
    ),
    "older than the kernels": (
        "operation gpuGetLastError() failed: no kernel image is available for execution on the device",
    ),
    "CUDA's libraries are missing": (
        "RuntimeError: jaxlib/cuda/versions_helpers.cc:38: operation cudaRuntimeGetVersion(&version) failed: Error "
        "loading CUDA libraries. GPU will not be used.\n\nRuntimeError: Unable to load CUDA. Is it installed?",
        "Unable to use CUDA because of the following issues with CUDA components:\nOutdated cuDNN installation found.\n"
        "Version JAX was built against: 8907\nMinimum supported: 9100\nInstalled version: 8907",
        "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: ['cpu', 'tpu'].",
    ),
    "CUDA cannot reach it": (
        "failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: CUDA_ERROR_NO_DEVICE: no CUDA-capable "
        "device is detected",
        "jaxlib.xla_extension.XlaRuntimeError: FAILED_PRECONDITION: No visible GPU devices.",
        "failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: CUDA_ERROR_SYSTEM_NOT_READY: system not "
        "yet initialized",
    ),
}


@pytest.mark.parametrize("what, text", [(what, text) for what, texts in TEXTS.items() for text in texts])
def test_each_trouble_has_its_message(what: str, text: str) -> None:
    message = gpu_trouble(text)
    assert message.startswith("The NVIDIA GPU cannot be used: ") and what in message
    assert "JAX_PLATFORMS=cpu" in message and text.splitlines()[-1] in message and "\n" not in message


def test_an_unknown_trouble_is_quoted() -> None:
    assert gpu_trouble("something new\n").endswith("set JAX_PLATFORMS=cpu. (JAX says: something new)")
    assert gpu_trouble("").endswith("set JAX_PLATFORMS=cpu.")


def test_the_oldest_cards() -> None:
    assert too_old("cuda12", "Tesla M60", "5.2") is too_old("cuda13", "Tesla T4", "7.5") is None
    assert too_old("cuda12", "NVIDIA B200", "10.0") is too_old(None, "anything", "1.0") is None
    assert "compute capability 3.7, and JAX for cuda12 needs 5.2" in (too_old("cuda12", "Tesla K80", "3.7") or "")
    assert "cramjax[cuda12] supports cards from 5.2 on" in (too_old("cuda13", "Tesla V100", "7.0") or "")
    assert "cramjax[cuda12]" not in (too_old("cuda13", "Tesla K80", "3.7") or "")


def test_memory_is_what_others_have_left() -> None:
    assert memory_fraction("") == 0.95  # not known
    assert memory_fraction("80994, 81559\n") == 0.95
    assert memory_fraction("80994, 81559\n65247, 81559\n") == pytest.approx(0.77, abs=0.001)  # four fifths are free
    with pytest.raises(ConfigError, match=r"Other processes hold 60\.0 of the GPU's 80\.0 GiB.*nvidia-smi"):
        memory_fraction("20480, 81920\n")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has not started JAX, on a machine with a card and JAX's plugin, without anything chosen."""
    starting.start.cache_clear()
    monkeypatch.setattr(starting, "nvidia_card", lambda: True)
    monkeypatch.setattr(starting, "_plugin", lambda: "cuda12")
    monkeypatch.setattr(starting, "_installed", lambda: {"cpu", "cuda"})
    monkeypatch.setattr(starting, "_jax_runs", lambda: False)
    monkeypatch.setattr(starting.shutil, "which", lambda _: None)
    memory = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    for name in (*memory, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)
    starting.start.cache_clear()


def _jax_says(*messages: str, devices: Any = None, level: int = logging.WARNING) -> Any:
    def answer() -> Any:
        for message in messages:
            logging.getLogger("jax._src.xla_bridge").log(level, message)
        return [types.SimpleNamespace(platform="cpu")] if devices is None else devices

    return answer


def test_a_fall_back_to_the_cpu_is_refused(fresh: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    text = "CUDA backend failed to initialize: CUDA driver version is insufficient for CUDA runtime version"
    fresh.setattr(jax, "devices", _jax_says(text))
    with pytest.raises(ConfigError, match="its driver does not fit"):
        starting.start()
    assert capfd.readouterr().err == ""  # nothing but our message


def test_a_command_that_cannot_use_the_gpu_exits_with_2(
    fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.setattr(jax, "devices", _jax_says("Unable to load CUDA. Is it installed?"))
    assert main(["plan", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The NVIDIA GPU cannot be used: CUDA's libraries are missing")
    assert error.count("\n") == 1


def test_a_backend_that_was_asked_for_and_fails(fresh: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices.")

    fresh.setattr(jax, "devices", fails)
    jax.config.update("jax_platforms", "cuda")
    with pytest.raises(ConfigError, match="CUDA cannot reach it"):
        starting.start()


def test_the_cpu_is_a_choice(fresh: pytest.MonkeyPatch) -> None:
    cpu = [types.SimpleNamespace(platform="cpu")]
    fresh.setattr(jax, "devices", lambda: cpu)
    jax.config.update("jax_platforms", "cpu")
    assert starting.start() == tuple(cpu)
    jax.config.update("jax_platforms", None)
    for hidden in ("", "-1", " -1", "-1,0", "NoDevFiles", "none", "GPU-"):
        starting.start.cache_clear()
        fresh.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert starting.start() == tuple(cpu)
    for shown in ("0", " 1,-1", "GPU-8932f937", "MIG-8932f937,0"):
        starting.start.cache_clear()
        fresh.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(ConfigError, match="GPU cannot be used"):
            starting.start()


def test_a_gpu_that_works_is_used(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")]
    fresh.setattr(jax, "devices", _jax_says("something else", devices=gpu))
    assert starting.start() == tuple(gpu) and starting.start() is starting.start()
    assert caplog.messages == ["something else"]  # JAX's other words are passed on
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    starting.start.cache_clear()
    gpu[0].compute_capability = "3.7"
    with pytest.raises(ConfigError, match="needs 5.2"):
        starting.start()


class _Cards:
    """A machine with these cards: free and total MiB of each, by PCI order, as `nvidia-smi` prints them."""

    def __init__(self, patch: pytest.MonkeyPatch, *lines: str):
        self._lines, self._patch, self.asked = lines, patch, []
        gpu = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")]
        patch.setattr(jax, "devices", lambda: gpu)
        patch.setattr(starting.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        patch.setattr(starting.subprocess, "run", self._smi)

    def _smi(self, words: list[str], timeout: float, **_: Any) -> Any:
        assert 0 < timeout < 60
        self.asked.append(words)
        numbers = [word.removeprefix("--id=") for word in words if word.startswith("--id=")]
        chosen = [self._lines[int(n)] for n in numbers if n.isdigit()] or self._lines
        return types.SimpleNamespace(stdout="".join(f"{line}\n" for line in chosen), returncode=0)

    def fraction(self) -> str | None:
        """What a process takes that starts now."""
        starting.start.cache_clear()
        self._patch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
        starting.start()
        return os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_memory_is_asked_of_the_driver(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cards = _Cards(fresh, "80994, 81559", "65247, 81559")
    fresh.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert cards.fraction() == "0.77"
    assert caplog.messages == ["Other processes hold memory of the GPU: this one takes 77% of it."]
    fresh.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cards.fraction() == "0.95"
    starting.start.cache_clear()
    cards.asked.clear()
    fresh.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")  # the user's own word
    starting.start()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.3" and not cards.asked


def test_numbers_of_unlike_cards_are_not_trusted(fresh: pytest.MonkeyPatch) -> None:
    cards = _Cards(fresh, "1000, 24564", "80994, 81559")  # CUDA's 0 is the faster: the second here
    fresh.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cards.fraction() == "0.95"
    for name, value in (("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", "GPU-8932f937")):
        with fresh.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match="Other processes hold"):
                cards.fraction()


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError(13, "denied")])
def test_a_driver_that_does_not_answer(error: Exception, fresh: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    cards = _Cards(fresh, "1000, 81559")
    fresh.setattr(starting.subprocess, "run", fails)
    assert cards.fraction() == "0.95"


def test_the_memory_of_a_jax_that_runs_is_not_others(fresh: pytest.MonkeyPatch) -> None:
    jax.devices()
    cards = _Cards(fresh, "1000, 81559")  # three quarters and more are this process's
    fresh.setattr(starting, "_jax_runs", jax_runs)
    assert cards.fraction() is None and not cards.asked


def test_a_jax_that_does_not_run() -> None:
    code = "import jax, cramjax.start as s; assert not s._jax_runs(); jax.devices(); assert s._jax_runs()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asking_for_a_gpu_where_there_is_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(starting, "nvidia_card", lambda: False)
    jax.config.update("jax_platforms", "cuda")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS is cuda, but this computer shows no NVIDIA GPU"):
        starting.start()


@pytest.mark.parametrize("asked", ["gpu", "rocm", "rocm,cpu", "tpu", None])
def test_other_devices_are_not_cudas(asked: str | None, fresh: pytest.MonkeyPatch) -> None:
    found = [types.SimpleNamespace(platform="gpu")]
    fresh.setattr(starting, "nvidia_card", lambda: False)
    fresh.setattr(starting, "_installed", lambda: {"cpu", "cuda", "rocm"})
    fresh.setattr(jax, "devices", lambda: found)
    jax.config.update("jax_platforms", asked)
    assert starting.start() == tuple(found) and jax.config.values["jax_platforms"] == asked
    if asked == "gpu":
        starting.start.cache_clear()
        fresh.setattr(starting, "_installed", lambda: {"cpu", "cuda", "tpu"})
        with pytest.raises(ConfigError, match="JAX_PLATFORMS is gpu, but this computer shows no NVIDIA GPU"):
            starting.start()


@pytest.mark.parametrize("card", [False, True])
def test_a_mistaken_platform_is_told_what_there_is(card: bool, fresh: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("Unable to initialize backend 'rocm': not in the list of known backends: ['cpu', 'cuda'].\n")

    fresh.setattr(starting, "nvidia_card", lambda: card)
    fresh.setattr(starting, "_installed", lambda: {"cpu", "tpu"})
    fresh.setattr(jax, "devices", fails)
    jax.config.update("jax_platforms", "rocm")
    with pytest.raises(
        ConfigError, match=r"^JAX cannot start: .*'cuda'\]\. JAX_PLATFORMS may be unset, or cpu or tpu\.$"
    ):
        starting.start()


def test_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xla_rocm60", "xla_cuda13"):
        (tmp_path / "jax_plugins" / name).mkdir(parents=True)
        (tmp_path / "jax_plugins" / name / "__init__.py").touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "jax_plugins")])
    monkeypatch.setattr(starting.importlib.util, "find_spec", {"jax_plugins": spec}.get)
    monkeypatch.setattr(starting, "entry_points", lambda group: [types.SimpleNamespace(name="xla_cuda13")])
    assert starting._installed() == {"cpu", "cuda", "rocm"}


_COMMANDS = {
    "plan": "main(['plan', 'quickstart', '--train.compute_dtype=float32'])",
    "target": "from cramjax import devices; devices.target()",
    "notebook": "import cramjax; cramjax.plan('quickstart', train={'compute_dtype': 'float32'})",
}


@pytest.mark.slow
@pytest.mark.skipif(nvidia_card(), reason="this machine has an NVIDIA card")
@pytest.mark.parametrize("name", _COMMANDS)
def test_without_a_card_nothing_is_said_of_cuda(name: str) -> None:
    # As a user's shell has it, with the extra `aot` installed or not.
    environment = {n: value for n, value in os.environ.items() if n not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    code = f"from cramjax.cli import main\nif {_COMMANDS[name].startswith('main')!r}: assert main(['--help']) == 0\n"
    result = subprocess.run(
        [sys.executable, "-c", code + _COMMANDS[name]], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0 and result.stderr == ""
