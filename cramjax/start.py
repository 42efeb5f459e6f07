"""Finding the devices: the one place where JAX is started, and where a GPU that cannot be used is told.

JAX itself falls back to the CPU with a warning, a traceback or nothing at all. Here it is a mistake with one message,
unless the user has chosen the CPU.
"""

import functools
import importlib.util
import logging
import os
import pkgutil
import re
import shutil
import subprocess
from importlib.metadata import entry_points
from typing import Any

import jax

from cramjax.errors import ConfigError
from cramjax.notices import nvidia_card, without_cuda_notices

MEMORY_FRACTION = 0.95
"""Share of a GPU's memory that this process takes at its first computation. JAX's own default is three quarters."""

_SMALLEST_FRACTION = 0.5
"""Share below which a GPU belongs to another process."""

_MARGIN = 0.03
"""Share of a GPU's memory that is left free beside other processes, for what CUDA itself takes."""

_SMI_SECONDS = 10
"""How long `nvidia-smi` may take: a card in trouble can hold it for ever."""

_OLDEST = {"cuda12": (5, 2), "cuda13": (7, 5)}
"""Compute capability that JAX's packages are built for (its installation guide)."""

# What the texts of JAX, XLA and CUDA say is wrong, and what to do; the first that is found counts.
_TROUBLES = (
    (
        r"OUT_OF_MEMORY|RESOURCE_EXHAUSTED|no supported devices found for platform CUDA",
        "another process holds its memory",
        "End that process (`nvidia-smi` lists it), or choose another GPU with CUDA_VISIBLE_DEVICES",
    ),
    (
        r"driver version is insufficient|SYSTEM_DRIVER_MISMATCH|does not match DSO version|UNSUPPORTED_PTX_VERSION"
        r"|[Ii]nsufficient driver",
        "its driver does not fit the CUDA that JAX is built for",
        "Update NVIDIA's driver (525 or newer for CUDA 12, 580 for CUDA 13) and restart the computer, or install the "
        'older CUDA with pip install "cramjax[cuda12]"',
    ),
    (
        r"no kernel image is available|requires compute capability",
        "it is older than the kernels of JAX",
        "Use a newer card: compute capability 5.2 with cramjax[cuda12], 7.5 with cramjax[cuda13]",
    ),
    (
        r"Unable to load cu|Unable to load CUDA|Error loading CUDA libraries|Outdated \w+ installation"
        r"|issues with CUDA components|cannot open shared object file|not in the list of known backends",
        "CUDA's libraries are missing or too old",
        'Install them with pip install --upgrade "cramjax[cuda12]" (or cuda13), and leave LD_LIBRARY_PATH unset',
    ),
    (
        r"CUDA_ERROR_NO_DEVICE|No visible GPU devices|CUDA_ERROR_SYSTEM_NOT_READY|CUDA_ERROR_UNKNOWN|cuInit",
        "CUDA cannot reach it",
        "See that `nvidia-smi` lists it; if it does not, reinstall NVIDIA's driver, start the container with --gpus "
        "all, or restart the computer",
    ),
)

_log = logging.getLogger(__name__)

_CPU = "To use the CPU instead, set JAX_PLATFORMS=cpu."


@functools.cache
def start() -> tuple[Any, ...]:
    """JAX's devices; the first call starts it, and lets it have nearly all of a GPU's memory that is free.

    Call it before the first computation. `XLA_PYTHON_CLIENT_MEM_FRACTION` and `JAX_PLATFORMS` are the user's: what they
    say is done. A CUDA plugin on a machine without an NVIDIA card is there to compile, and is not asked for one. Where
    JAX runs already, as in a notebook that has used it, its memory is taken.

    Raises:
        ConfigError: there is an NVIDIA card and a CUDA plugin for JAX, but they cannot be used; or JAX_PLATFORMS asks
            for what there is not.
    """
    plugin, card, asked = _plugin(), nvidia_card(), jax.config.values["jax_platforms"] or ""
    if not card:
        installed, platforms = _installed(), asked.split(",")
        gpu_is_cuda = installed - {"cpu", "tpu"} == {"cuda"}  # it may be ROCm's
        if "cuda" in platforms or ("gpu" in platforms and gpu_is_cuda):
            raise ConfigError(f"JAX_PLATFORMS is {asked}, but this computer shows no NVIDIA GPU: unset it, or set cpu.")
        if not asked and installed == {"cpu", "cuda"}:
            jax.config.update("jax_platforms", "cpu")
        with without_cuda_notices():
            return _devices()
    if plugin is None or asked == "cpu":
        return _devices()
    hidden = _hidden()
    if not (hidden or _jax_runs()):
        _take_memory()
    with _Said() as said:
        found = _devices()
    if found[0].platform == "cpu" and not (asked or hidden):
        raise ConfigError(gpu_trouble(said.text))
    if found[0].platform == "gpu" and (trouble := too_old(plugin, found[0].device_kind, found[0].compute_capability)):
        raise ConfigError(trouble)
    said.repeat()
    return found


def gpu_trouble(text: str) -> str:
    """The message for a GPU that cannot be used.

    Args:
        text: what JAX, XLA and CUDA said of it, in their words.
    """
    for pattern, what, remedy in _TROUBLES:
        if re.search(pattern, text):
            return f"The NVIDIA GPU cannot be used: {what}. {remedy}. {_CPU}{_quoted(text)}"
    return f"The NVIDIA GPU cannot be used. See that `nvidia-smi` lists it. {_CPU}{_quoted(text)}"


def too_old(plugin: str | None, kind: str, capability: str) -> str | None:
    """The message for a card that JAX has no kernels for; None where it has.

    Args:
        plugin: `cuda12` or `cuda13`.
        kind: the card's name.
        capability: its CUDA compute capability, such as `8.9`.
    """
    oldest = _OLDEST.get(plugin or "")
    if oldest is None or tuple(map(int, capability.split("."))) >= oldest:
        return None
    needed = ".".join(map(str, oldest))
    other = " cramjax[cuda12] supports cards from 5.2 on." if plugin == "cuda13" and capability >= "5.2" else ""
    return f"{kind} has compute capability {capability}, and JAX for {plugin} needs {needed} or more.{other} {_CPU}"


def memory_fraction(listed: str) -> float:
    """Share of GPUs' memory that this process may take: what others have left of it, 0.95 at most.

    Args:
        listed: a line for each GPU, `free, total` in MiB, as `nvidia-smi` prints them.

    Raises:
        ConfigError: others hold half of a GPU or more.
    """
    fraction = 1.0
    for line in listed.splitlines():
        free, total = (int(number) for number in line.split(","))
        fraction = min(fraction, free / total)
        if fraction < _SMALLEST_FRACTION:
            raise ConfigError(
                f"Other processes hold {(total - free) / 1024:.1f} of the GPU's {total / 1024:.1f} GiB of memory: end "
                "them (`nvidia-smi` lists them), choose another GPU with CUDA_VISIBLE_DEVICES, or share it by setting "
                "XLA_PYTHON_CLIENT_MEM_FRACTION to the part of its memory that this process is to take."
            )
    return min(MEMORY_FRACTION, round(fraction - _MARGIN, 3))


def _take_memory() -> None:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if name in os.environ or os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == "false":
        return
    fraction = memory_fraction(_listed_memory())
    if fraction < MEMORY_FRACTION:
        _log.warning("Other processes hold memory of the GPU: this one takes %.0f%% of it.", 100 * fraction)
    os.environ[name] = str(fraction)


def _listed_memory() -> str:
    """What `nvidia-smi` says of the visible cards' free and total memory; nothing where it is not known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return _queried()
    if not visible.strip().startswith(("GPU-", "MIG-")):
        # A number is of the PCI order there, and of the fastest first in CUDA: between like cards it is the same.
        totals = {line.split(",")[1] for line in _queried().splitlines()}
        if len(totals) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            return ""
    return _queried(f"--id={visible}")


def _queried(*words: str) -> str:
    """A line of free and total memory for each card that `nvidia-smi` is asked for."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits", *words]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    numbers = re.fullmatch(r"(\d+, \d+\n)+", result.stdout)
    return result.stdout if numbers and result.returncode == 0 else ""


def _hidden() -> bool:
    """Whether the user hides all cards from CUDA, which reads its list up to the first entry that names none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return re.fullmatch(r"\d+|(GPU|MIG)-.+", first) is None


def _jax_runs() -> bool:
    """Whether JAX was started before, by others in this process. There is no public way to ask."""
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:
        return False
    return backends_are_initialized()


def _devices() -> tuple[Any, ...]:
    try:
        return tuple(jax.devices())
    except RuntimeError as error:
        text = str(error).strip()
        if "backend 'cuda'" in text and nvidia_card():
            raise ConfigError(gpu_trouble(text)) from None
        names = " or ".join(sorted(_installed()))
        raise ConfigError(f"JAX cannot start: {text.rstrip('.')}. JAX_PLATFORMS may be unset, or {names}.") from None


def _installed() -> set[str]:
    """The platforms that JAX has packages for here, as JAX_PLATFORMS calls them."""
    plugins = {entry.name for entry in entry_points(group="jax_plugins")}
    if (spec := importlib.util.find_spec("jax_plugins")) is not None:
        plugins |= {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}
    platforms = {re.sub(r"^xla_|\d+$", "", name) for name in plugins}
    return platforms | {"cpu"} | ({"tpu"} if importlib.util.find_spec("libtpu") is not None else set())


def _plugin() -> str | None:
    """Which of JAX's CUDA plugins is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    return next((n for n in _OLDEST if importlib.util.find_spec(f"jax_plugins.xla_{n}") is not None), None)


def _quoted(text: str) -> str:
    """The last line of a text, which says most."""
    lines = text.strip().splitlines()
    return f" (JAX says: {lines[-1].strip()})" if lines else ""


class _Said(logging.Handler):
    """Keeps what JAX says of its backends, in place of its log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())
        self._records: list[logging.LogRecord] = []
        self._logger = logging.getLogger("jax._src.xla_bridge")

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(map(self.format, self._records))

    def repeat(self) -> None:
        """Let the log have it after all."""
        for record in self._records:
            self._logger.handle(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self._records.append(record)

    def __enter__(self) -> "_Said":
        self._logger.addHandler(self)
        self._propagates, self._logger.propagate = self._logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagates
