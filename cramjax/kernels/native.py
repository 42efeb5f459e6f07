"""Kernels in C++ for CPUs: compiled on the machine that runs them, once, and kept in the cache directory."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jaxlib.version

from cramjax.cache import cache_directory
from cramjax.devices import cpu_fingerprint

_COMPILERS = ("c++", "g++", "clang++")
# Made for this CPU's instructions: the cache keeps libraries of other CPUs apart. Products and sums may be fused.
_HEADERS = Path(__file__).parent
"""Where sources find each other, by paths that begin here."""
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-w")
_NATIVE = ("-march=native", "-mcpu=native", None)
_SECONDS = 120


class CannotBuild(Exception):
    """Why there is no library here, as a clause."""


def register(source: Path, name: str) -> str | None:
    """Make a function of a C++ file one that programs for CPUs can call (`jax.ffi.ffi_call`).

    Args:
        source: the file; what it needs is the standard library, headers beside this module and XLA's.
        name: of the handler in it, and of the target.

    Returns:
        Why it cannot be called here, as a clause; None where it can.
    """
    return _register(source, name, os.environ.get("PATH", ""))


@functools.cache
def _register(source: Path, name: str, _: str) -> str | None:
    try:
        library = ctypes.CDLL(str(_built(source)))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (CannotBuild, OSError) as error:
        return str(error)
    return None


def digest(source: Path) -> str:
    """Of what a library is made from, and how."""
    text = b"".join(file.read_bytes() for file in (source, *sorted(_HEADERS.rglob("*.h"))))
    return hashlib.sha256(text + " ".join(_FLAGS).encode()).hexdigest()[:16]


def _built(source: Path) -> Path:
    """The library of a source file, compiled where the cache has none."""
    kept = f"{cpu_fingerprint()}-jaxlib-{jaxlib.version.__version__}"
    directory = cache_directory() / "native"
    library = directory / f"{source.stem}-{digest(source)}-{kept}.so"
    if library.is_file():
        return library
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise CannotBuild(f"there is no C++ compiler ({', '.join(_COMPILERS)})")
    directory.mkdir(parents=True, exist_ok=True)
    # Two processes may compile at once: each writes a file of its own, and the last one stays.
    temporary = library.with_name(f".{library.name}.{os.getpid()}.tmp")
    said = ""
    try:
        for native in _NATIVE:  # what a compiler calls this CPU differs
            flags = [*_FLAGS, *([native] if native else []), f"-I{_HEADERS}", f"-I{jax.ffi.include_dir()}"]
            command = [compiler, *flags, str(source), "-o", str(temporary)]
            made = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
            if made.returncode == 0:
                temporary.replace(library)
                return library
            said = made.stderr
    except subprocess.TimeoutExpired:
        said = f"it took more than {_SECONDS} seconds"
    finally:
        temporary.unlink(missing_ok=True)
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or ["it said nothing"]
    raise CannotBuild(f"{compiler} does not compile {source.name}: {lines[0].strip()}")
