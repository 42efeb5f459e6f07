"""Checkpoints: written by Orbax in the background, whole or not at all, verified by checksum before they are trusted.

A checkpoint is a directory `step_00001234/` with `state/` (Orbax), `meta.json` (clock, data position, configuration,
tokenizer), `score.json` (once it has been evaluated) and `checksums.json` (SHA-256 of every other file). It is built
under a hidden name and renamed when complete.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from cramjax.cache import write_atomically
from cramjax.errors import RunError

FORMAT = 1
"""Version of run directories and their checkpoints; where none is written, it is the one before: 0."""

_META, _CHECKSUMS, _SCORE = "meta.json", "checksums.json", "score.json"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint holds beside its arrays."""

    step: int
    position: int
    """Sequences of the data order consumed, from the start of the run."""
    spent: dict[str, float]
    config: str
    """The resolved configuration, as YAML."""
    tokenizer: str
    """The tokenizer, as the text of its `tokenizer.json`."""
    final_fraction: float
    """The spent fraction that the last step was planned for: exactly 1 when it was the run's last."""
    data: str
    """Which tokens the run reads: `TokenFile.identity`."""
    base: str | None = None
    """Of an adapter: which weights it belongs to, which are not here."""
    bits_per_byte: float | None = None
    """Score on the fixed held-out subset, where one was measured at this step."""
    format: int = FORMAT


class CheckpointWriter:
    """Saves checkpoints one at a time on a thread of its own, and keeps the newest and the best.

    Args:
        directory: where the checkpoints go.
        keep: newest checkpoints kept, beside the one with the lowest bits per byte.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: list[Path] = []
        _print_no_tracebacks()

    def save(self, state: PyTree, meta: Meta) -> None:
        """Copy the state to host memory and write it in the background, after any earlier save has ended.

        Raises:
            RunError: an earlier save failed (the checkpoints before it are intact).
        """
        self.wait()
        # A copy, not a view: the next step reuses these buffers.
        host = jax.tree.map(lambda x: np.array(x), state)
        self._start(lambda: self._write(host, meta))

    def score(self, step: int, bits_per_byte: float) -> None:
        """Note, in the background, the held-out score of the checkpoint of a step, which was saved before it was known.

        Raises:
            RunError: the save in question failed.
        """
        saving = self._thread

        def note() -> None:
            if saving is not None:
                saving.join()
            if self._error is None:
                self._note(self.directory / _name(step), bits_per_byte)

        self._start(note)

    def join(self) -> None:
        """Wait for the save in progress, however it ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            RunError: it failed.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise _save_error(self.directory, error) from error

    def discard(self) -> None:
        """Remove the checkpoints that this writer has written; those that others wrote stay."""
        for path in self._written:
            shutil.rmtree(path, ignore_errors=True)
        self._written.clear()

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to the training thread, which raises it
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, host: PyTree, meta: Meta) -> None:
        name = _name(meta.step)
        temporary, final = self.directory / f".{name}.tmp", self.directory / name
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save((temporary / "state").absolute(), _as_tree(host))
            (temporary / _META).write_text(json.dumps(meta.__dict__), encoding="utf-8")
            (temporary / _CHECKSUMS).write_text(json.dumps(_checksums(temporary), indent=1), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            temporary.replace(final)
        except BaseException:
            _remove_until_gone(temporary)
            raise
        self._written.append(final)
        self._prune(final)

    def _note(self, path: Path, bits_per_byte: float) -> None:
        write_atomically(path / _SCORE, json.dumps({"bits_per_byte": bits_per_byte}))
        # A kill before this leaves a score that no checksum guards, and the rest as it was.
        expected = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        write_atomically(path / _CHECKSUMS, json.dumps(expected | {_SCORE: _digest(path / _SCORE)}, indent=1))
        self._prune(path)

    def _prune(self, written: Path) -> None:
        # Later ones can only be damaged ones that a resume has passed over.
        paths = [path for path in list_checkpoints(self.directory) if path.name <= written.name]
        scores = {path: _score(path) for path in paths}
        scored = [path for path in paths if scores[path] is not None]
        kept = set(paths[-self.keep :]) | set(sorted(scored, key=lambda path: scores[path] or 0.0)[:1])
        for path in set(paths) - kept:
            shutil.rmtree(path)


def _remove_until_gone(directory: Path) -> None:
    # The first array that cannot be written ends a save; threads of the library still write the others, and make
    # the directory anew.
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
        if not directory.exists():
            return


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step_*") if path.is_dir())


def read_meta(path: Path) -> Meta:
    """What a checkpoint holds beside its arrays.

    Raises:
        RunError: it is of a newer format.
    """
    values = {"format": 0} | json.loads((path / _META).read_text(encoding="utf-8"))
    require_known(values["format"], path)
    if (path / _SCORE).exists():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # `find_damage` names it, where a checksum guards it
            values["bits_per_byte"] = float(json.loads((path / _SCORE).read_text(encoding="utf-8"))["bits_per_byte"])
    return Meta(**values)


def require_known(version: int, where: Path) -> None:
    """Refuse a format that is newer than this code.

    Raises:
        RunError: it is.
    """
    if version > FORMAT:
        raise RunError(
            f"{where} is of format {version}, and this CramJAX knows formats to {FORMAT}: use the one that wrote it, "
            "or a newer one."
        )


def newest_intact(directory: Path, report: Any) -> Path | None:
    """The newest checkpoint whose checksums hold; each damaged one is named through `report(message)` and passed
    over.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        damage = find_damage(path)
        if damage is None:
            return path
        instead = "there is none before it" if path == paths[0] else "using the one before it"
        report(f"checkpoint {path.name} is damaged ({damage}); {instead}.")
    return None


def best_intact(directory: Path, report: Any) -> Path | None:
    """The intact checkpoint with the lowest held-out bits per byte, else the newest intact one; each damaged one is
    named through `report(message)`.
    """
    scored = [(score, path) for path in list_checkpoints(directory) if (score := _score(path)) is not None]
    for _, path in sorted(scored):
        damage = find_damage(path)
        if damage is None:
            return path
        report(f"checkpoint {path.name}, the best, is damaged ({damage}); using the next best.")
    return newest_intact(directory, report)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files (missing, changed), or None if nothing is."""
    try:
        expected: dict[str, str] = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        expected[_META]
    except (OSError, ValueError, TypeError, KeyError):
        return f"{_CHECKSUMS} cannot be read"
    actual = _checksums(path)
    for name, digest in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != digest:
            return f"{name} does not match its checksum"
    return None


def restore(path: Path, like: PyTree) -> PyTree:
    """Read a state with the structure, shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

    Raises:
        RunError: the checkpoint's arrays are not those of `like`.
    """
    return _restore(path, like, whole=True)


def restore_part(path: Path, like: PyTree) -> PyTree:
    """Read what of a state is not None in `like`, and nothing else.

    Raises:
        RunError: the checkpoint's arrays are not those of `like`.
    """
    return _restore(path, like, whole=False)


def _restore(path: Path, like: PyTree, *, whole: bool) -> PyTree:
    tree = _as_tree(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like))
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata((path / "state").absolute()).item_metadata.tree
        found = {key: tuple(leaf.shape) for key, leaf in stored.items() if whole or key in tree}
        wanted = {key: tuple(leaf.shape) for key, leaf in tree.items()}
        if found != wanted:
            name = next(k for k in sorted(found | wanted) if found.get(k) != wanted.get(k))
            raise RunError(
                f"checkpoint {path} is of another configuration: {name} has shape {found.get(name, 'none')}, "
                f"this run needs {wanted.get(name, 'none')}. Resume with the configuration in the run directory."
            )
        asked = ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=not whole,
        )
        arrays = checkpointer.restore((path / "state").absolute(), asked)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[key] for key in tree])


def _as_tree(state: PyTree) -> dict[str, Any]:
    """A flat dictionary of the state's leaves by path, so that the files do not depend on Python classes."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _score(path: Path) -> float | None:
    try:
        return read_meta(path).bits_per_byte
    except (OSError, ValueError, TypeError, RunError):
        return None  # unreadable meta data: `find_damage` names it when the checkpoint is tried


def _checksums(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != _CHECKSUMS)
    return {str(file.relative_to(path)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step_{step:08d}"


@functools.cache
def _print_no_tracebacks() -> None:
    """Have the library print no tracebacks of its threads' errors, which it also raises, from here on."""

    def kept(record: logging.LogRecord) -> bool:
        return "_SignalingThread" not in record.getMessage()

    hook = sys.unraisablehook

    def unraisable(trouble: Any) -> None:
        if "Event loop is closed" not in str(trouble.exc_value):  # of a write that ends after another has failed
            hook(trouble)

    logging.getLogger("absl").addFilter(kept)
    sys.unraisablehook = unraisable


def _save_error(directory: Path, error: BaseException) -> RunError:
    intact = list_checkpoints(directory)
    last = f"the last good checkpoint is {intact[-1]}" if intact else "no earlier checkpoint exists"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "No space left" in str(error):
        reason = "no space left on the device; free some"
    else:
        reason = f"{type(error).__name__}: {error}; mend that"
    return RunError(f"a checkpoint could not be saved in {directory}: {reason} and resume the run ({last}).")
