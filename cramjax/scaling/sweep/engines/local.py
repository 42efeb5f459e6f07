"""This machine: a pool of processes, one for each GPU, or on CPUs one for each share of the cores."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cramjax.cache import write_atomically
from cramjax.errors import ConfigError
from cramjax.scaling.sweep.trial import FAILED, error_file, is_done

_ATTEMPTS = 3
"""Starts of a trial whose process is killed by something else (out of memory, say) before it counts as failed."""
_PAUSE = 0.2


@dataclass(frozen=True)
class Slot:
    """A share of the machine that one trial has to itself."""

    gpu: str | None
    cores: int | None


def slots(jobs: int | None, trials: int) -> list[Slot]:
    """Divide this machine: a slot for each GPU; without GPUs, equal shares of the cores.

    Args:
        jobs: trials at the same time, at least 1. Default: one for each GPU; on CPUs, as many as there are cores and
            trials.
        trials: how many there are to run.

    Raises:
        ConfigError: more `jobs` than GPUs.
    """
    gpus = _gpus()
    if gpus:
        if jobs is not None and jobs > len(gpus):
            raise ConfigError(f"--jobs is {jobs}, but a trial has a GPU to itself and there are {len(gpus)}.")
        return [Slot(gpu, None) for gpu in gpus[:jobs]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = jobs or max(1, min(cores, trials))
    return [Slot(None, max(1, cores // number))] * number


def run(
    names: Sequence[str],
    out: Path,
    machine: Sequence[Slot],
    stopping: Callable[[], bool],
    tick: Callable[[Sequence[str]], None],
) -> Iterator[str]:
    """Run trials in a pool of processes.

    Args:
        names: of the trials.
        out: the sweep's directory.
        machine: from `slots`.
        stopping: whether to stop: children are then told to save and leave, and no other is started.
        tick: called a few times a second with the names of trials that are running.

    Yields:
        The name of each trial whose process has ended.
    """
    waiting, free = list(names), list(machine)
    running: dict[str, tuple[subprocess.Popen[bytes], Slot]] = {}
    attempts = dict.fromkeys(names, 0)
    told = False
    try:
        while running or (waiting and not stopping()):
            while waiting and free and not stopping():
                name, slot = waiting.pop(0), free.pop(0)
                attempts[name] += 1
                running[name] = _start(name, out, slot), slot
            if stopping() and not told:
                told = True
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            for name, (process, slot) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                free.append(slot)
                lost = code not in (0, FAILED) and not is_done(out, name) and not stopping()
                if lost and attempts[name] < _ATTEMPTS:
                    waiting.insert(0, name)
                    continue
                if lost:
                    write_atomically(error_file(out, name), _loss(code, out, name))
                yield name
            tick(list(running))
            time.sleep(_PAUSE)
    finally:
        for process, _ in running.values():
            process.kill()


def _start(name: str, out: Path, slot: Slot) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    command = [sys.executable, "-m", "cramjax.scaling.sweep.trial", str(out), name, "--parent", str(os.getpid())]
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    if slot.cores is not None:
        command += ["--cores", str(slot.cores)]
    with (out / "trials" / f"{name}.log").open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _loss(code: int, out: Path, name: str) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    memory = " It may have run out of memory: give fewer --jobs." if code == -signal.SIGKILL else ""
    return f"its process {how}, {_ATTEMPTS} times.{memory} What it said is in {out / 'trials' / name}.log.\n"


def _gpus() -> list[str]:
    """The GPUs that jax would use, by what `CUDA_VISIBLE_DEVICES` calls them."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True)
    except OSError:
        return []
    return listed.stdout.decode().split() if listed.returncode == 0 else []
