"""What is done of a compression, on disk: the same command goes on from there after a kill, and gives the same bytes.

Beside the output, `OUT.unfinished` has for each block that is done its leaves, what is reported of it, and the residual
streams after the last of them. A block counts when its JSON file is there, which is renamed into its place last.
"""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.cache import write_atomically
from cramjax.errors import ModelError
from cramjax.formats.tensors import Output, open_safetensors, whole, write_safetensors
from cramjax.kernels.packed import adapter_settings, from_arrays, to_arrays
from cramjax.training.lock import clear, is_empty, locked

_JOB, _MADE = "job.json", "made"


class Unfinished:
    """The directory of a compression that is under way.

    Args:
        path: the directory, which this process holds.
        job: what is compressed, how and on what, in JSON's types.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]):
        self._path = path
        known, self._job = _read(path / _JOB), dict(job)
        self.made: Mapping[str, Any] | None = None if known is None else known.pop(_MADE, None)
        """What was said of the output before it was written."""
        if known is not None and known != self._job:
            raise ModelError(
                f"{path} is what is done of another compression (of another model, other text, other options or "
                "another version): remove it, or give another path to --out."
            )
        if known is None:
            self._write(_JOB, self._job)

    @property
    def blocks(self) -> int:
        """How many are done."""
        done = 0
        while (self._path / f"block-{done:05}.json").is_file():
            done += 1
        return done

    def note(self, name: str, content: Any) -> None:
        """Keep a value of JSON's types."""
        self._write(f"{name}.json", content)

    def noted(self, name: str) -> Any:
        """What was kept under a name; None: nothing."""
        return _read(self._path / f"{name}.json")

    def save(
        self, block: int, leaves: Mapping[str, Any], streams: Sequence[np.ndarray] | None, report: Sequence[Any]
    ) -> None:
        """Keep a block that is done.

        Args:
            block: its number; those before it are kept.
            leaves: by the names of matrices.
            streams: after it, by microbatch; None: there is no calibration.
            report: what is said of it, in JSON's types.

        Raises:
            ModelError: it cannot be written.
        """
        with self._written():
            arrays = {name: np.asarray(array) for name, array in to_arrays(dict(leaves)).items()}
            sums = {
                "leaves": self._tensors(f"block-{block:05}", arrays),
                "streams": self._tensors(f"stream-{block:05}", _numbered(streams or ())),
            }
            known = {"report": report, "checksums": sums, "settings": adapter_settings(dict(leaves))}
            write_atomically(self._path / f"block-{block:05}.json", json.dumps(known))
            (self._path / f"stream-{block - 1:05}.safetensors").unlink(missing_ok=True)

    def load(self, block: int) -> tuple[dict[str, Any], list[Any]]:
        """The leaves of a block that is done by the names of matrices, and what is said of it.

        Raises:
            ModelError: a file is damaged.
        """
        known = _read(self._path / f"block-{block:05}.json")
        arrays = self._arrays(f"block-{block:05}", known["checksums"]["leaves"])
        return from_arrays(arrays, known["settings"]), known["report"]

    def streams(self, block: int) -> list[np.ndarray]:
        """The residual streams after the last block that is done, by microbatch.

        Raises:
            ModelError: the file is damaged.
        """
        known = _read(self._path / f"block-{block:05}.json")
        return list(self._arrays(f"stream-{block:05}", known["checksums"]["streams"]).values())

    def making(self, made: Mapping[str, Any]) -> None:
        """Say what the output will be, in JSON's types, `at` among it: `was_made` knows it by that."""
        self._write(_JOB, {**self._job, _MADE: dict(made)})

    def remove(self) -> None:
        """Remove what is kept: all is done. What says so goes last: killed before, the same call goes on here."""
        clear(self._path, but=(_JOB,))
        clear(self._path)

    def _arrays(self, name: str, checksums: Mapping[str, int]) -> dict[str, np.ndarray]:
        tensors = open_safetensors([self._path / f"{name}.safetensors"], checksums)
        return {each: tensors.read(each) for each in tensors.names}

    def _tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        outputs: list[Output] = [whole(each, x.shape, x.dtype, lambda x=x: x) for each, x in arrays.items()]
        temporary = self._path / f".{name}.tmp"
        checksums = write_safetensors(temporary, outputs)
        temporary.replace(self._path / f"{name}.safetensors")
        return checksums

    def _write(self, name: str, content: Any) -> None:
        with self._written():
            write_atomically(self._path / name, json.dumps(content))

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno == errno.ENOSPC or "No space left" in str(error)
            reason = "no space is left on the device: free some" if full else f"{error.strerror or error}: mend that"
            raise ModelError(
                f"{self._path} cannot be written: {reason}, and give the same command again; {self.blocks} blocks are "
                "done and kept."
            ) from error


@contextmanager
def unfinished(out: Path, job: Mapping[str, Any]) -> Iterator[Unfinished]:
    """What is done of the compression that makes a model directory.

    Args:
        out: the model directory.
        job: what is compressed, how and on what, in JSON's types.

    Raises:
        ModelError: what is there is of another compression.
        RunError: another process is at it.
    """
    path = _beside(out)
    with locked(path):
        yield Unfinished(path, job)
    if path.is_dir() and is_empty(path):
        shutil.rmtree(path, ignore_errors=True)


def was_made(out: Path) -> bool:
    """Whether a model directory, which is whole once it exists, is what the compression beside it made: a kill left
    that there.
    """
    known = _read(_beside(out) / _JOB) or {}
    if _MADE not in known or not out.is_dir():
        return False
    compressed = (_read(out / "origin.json") or {}).get("compressed") or [{}]
    return known[_MADE]["at"] == compressed[-1].get("at")


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def _numbered(streams: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{number:06}": x for number, x in enumerate(streams)}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ModelError(f"{file} is damaged: remove {file.parent}, and begin again.") from None
