"""Ray: a task for each trial, here or on a cluster; a lost worker's trial goes on elsewhere from its checkpoint.

All machines must see the sweep's directory under the same path, and have CramJAX installed.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cramjax.cache import write_atomically
from cramjax.errors import ConfigError, RunError
from cramjax.scaling.sweep.engines import RunEngine
from cramjax.scaling.sweep.trial import claimed_cores, error_file, run_trial

_RETRIES = 10
"""Workers that a trial may lose before it counts as failed."""
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5


def connected(out: Path, *, jobs: int | None, address: str | None, cpus: int | None, gpus: float | None) -> RunEngine:
    """An engine on Ray, which is known to be there.

    Args:
        out: the sweep's directory.
        jobs: most trials at the same time; None: as many as the resources allow.
        address: `HOST:PORT`, `ray://HOST:PORT` or `auto`; None: a Ray on this machine, for this sweep alone.
        cpus: cores of each trial; None: 1.
        gpus: GPUs of each trial; None: none.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or has no machine with such resources.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ConfigError('--engine ray needs Ray: pip install "cramjax[sweep]".') from None
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
        raise ConfigError(f"--gpus must be from 0 to 1, or a whole number, with --engine ray, got {gpus:g}.")
    if address is not None and address != "auto":
        _require_reachable(address)
    options = {"num_cpus": cpus or 1, "num_gpus": gpus or 0}
    return lambda names, stopping, tick: _run(names, out.resolve(), stopping, tick, jobs, address, options)


def _run(
    names: Sequence[str],
    out: Path,
    stopping: Callable[[], bool],
    tick: Callable[[Sequence[str]], None],
    jobs: int | None,
    address: str | None,
    options: dict[str, Any],
) -> Iterator[str]:
    import ray

    _connect(address)
    try:
        _require_room(options)
        # A process of its own for each trial: what jax holds goes with it.
        task = ray.remote(max_calls=1, max_retries=_RETRIES, **options)(_trial)
        waiting, cancelled = list(names), False
        tasks: dict[Any, str] = {}
        while tasks or (waiting and not stopping()):
            while waiting and not stopping() and (jobs is None or len(tasks) < jobs):
                name = waiting.pop(0)
                tasks[task.remote(str(out), name, options["num_cpus"], os.getcwd())] = name
            if stopping() and not cancelled:
                cancelled = True
                for reference in tasks:
                    ray.cancel(reference, force=False)  # a Ctrl-C in the worker: the run saves itself
            ended, _ = ray.wait(list(tasks), timeout=_POLL_SECONDS)
            for reference in ended:
                name = tasks.pop(reference)
                if not cancelled:
                    _note_loss(reference, out, name)
                yield name
            tick(list(tasks.values()))
    finally:
        ray.shutdown()


def _trial(out: str, name: str, cores: int, directory: str) -> None:
    """What a worker does; a trial that fails has said why in its directory. Relative paths are of `directory`."""
    from cramjax.errors import RunInterruptedError

    with contextlib.suppress(OSError):  # which this machine may lack
        os.chdir(directory)
    try:
        with claimed_cores(cores):
            run_trial(Path(out), name)
    except (RunInterruptedError, KeyboardInterrupt, Exception):
        return  # the sweep reads what came of it from there


def _note_loss(reference: Any, out: Path, name: str) -> None:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(reference)
    except RayTaskError as error:  # before the trial began: CramJAX is not installed there, say
        write_atomically(error_file(out, name), f"a worker of Ray cannot run trials: {_sentence(error)}\n")
    except RayError as error:
        what = f"Ray lost its worker {_RETRIES + 1} times: {_sentence(error)}"
        write_atomically(error_file(out, name), f"{what}\n")


def _sentence(error: Exception) -> str:
    """The first paragraph of an error, in one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n\n")[0].split())


def _connect(address: str | None) -> None:
    import ray
    from ray.exceptions import RayError

    own = {"address": "local", "include_dashboard": False}
    options: dict[str, Any] = own if address is None else {"address": address}
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        what = _sentence(error).rstrip(".") or type(error).__name__
        where = "a Ray on this machine" if address is None else f"a Ray at {address}"
        raise RunError(
            f"cannot use {where}: {what}. Start one with `ray start --head`, or give its --address."
        ) from None
    if threading.current_thread() is threading.main_thread():  # Ray puts its own in their place, which abort
        for number, handler in ours.items():
            signal.signal(number, handler)


def _require_reachable(address: str) -> None:
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(f"--address must be HOST:PORT, ray://HOST:PORT or auto, got {address!r}.")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray answers at {address} ({error.strerror or error}): start one with `ray start --head`, or mend "
            "--address."
        ) from None


def _require_room(options: dict[str, Any]) -> None:
    """Ray waits for ever for resources that no machine of the cluster has."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = options["num_cpus"], options["num_gpus"]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in machines):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in machines)
        raise ConfigError(
            f"no machine of the cluster has {cpus} CPUs and {gpus:g} GPUs for a trial; they have {largest}: give other "
            "--cpus and --gpus."
        )
