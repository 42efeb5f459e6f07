"""Whatever happens to a file of a run directory: the right result, or one message."""

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.config import RunConfig
from cramjax.errors import UserError
from cramjax.evaluation import evaluate_text
from cramjax.serve import generate
from cramjax.training import Run, load_run, resume, train
from cramjax.training.checkpoint import list_checkpoints

Tiny = Callable[..., RunConfig]

_SMALL: dict[str, Any] = {
    "budget": "6steps", "tokenizer__kind": "bytes", "data__sequence_length": 16, "model__layers": 1, "model__width": 16,
    "model__heads": 1, "model__mlp": 16, "checkpoint__points": 2, "evaluate__points": 2, "evaluate__tokens": 128,
    "optim__name": "adamw", "optim__ema": 0.0, "evaluate__samples": [""],
}  # fmt: skip
_MORE = "8steps"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


_HARMS: dict[str, Callable[[Path], Any]] = {
    "flip": _flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "random": lambda file: file.write_bytes(random.Random(0).randbytes(max(64, file.stat().st_size))),
    "removed": lambda file: file.unlink(),
}


@dataclass
class Whole:
    """A run that nothing has happened to, and what may come of it, from its checkpoints and from its start."""

    path: Path
    loaded: list[Run]
    scores: list[float]
    texts: list[str]
    resumed: list[float]

    def files(self) -> Iterator[Path]:
        """Its files, by their names in it; of checkpoints, those of the newest."""
        newest = list_checkpoints(self.path / "checkpoints")[-1]
        for file in sorted(self.path.rglob("*")):
            if file.is_file() and (newest in file.parents or self.path / "checkpoints" not in file.parents):
                yield file.relative_to(self.path)


def _evaluated(run: Run, text: Path) -> float:
    return evaluate_text(run, text).bits_per_byte


def _generated(run: Run) -> str:
    return str(generate(run, "the ", max_tokens=4, temperature=0.0)[0])


@pytest.fixture(scope="module")
def whole(tiny: Tiny, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Made once."""
    folder = tmp_path_factory.mktemp("whole")
    path = train(tiny(**_SMALL), folder / "run").path
    (path / "report.html").write_text("<html></html>", encoding="utf-8")
    text = next(corpus.glob("*.txt"))
    found = Whole(path, [], [], [], [])
    copy = folder / "copy"
    shutil.copytree(path, copy)
    for checkpoint in reversed(list_checkpoints(copy / "checkpoints")):
        found.loaded.append(load_run(copy))
        found.scores.append(_evaluated(found.loaded[-1], text))
        found.texts.append(_generated(found.loaded[-1]))
        shutil.copytree(copy, folder / "resumed")
        found.resumed.append(resume(folder / "resumed", budget=_MORE).summary["bits_per_byte"])
        shutil.rmtree(folder / "resumed")
        shutil.rmtree(checkpoint)
    found.resumed.append(resume(copy, budget=_MORE).summary["bits_per_byte"])
    assert len(found.loaded) == 2 and len(set(found.resumed)) == 3
    return found


def _same_weights(a: Run, b: Run) -> bool:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("harm", _HARMS)
def test_a_damaged_file_gives_the_right_result_or_one_message(
    harm: str, whole: Whole, corpus: Path, tmp_path: Path
) -> None:
    text = next(corpus.glob("*.txt"))
    said: dict[str, str] = {}
    for name in whole.files():
        of_checkpoint = len(name.parts) > 2  # where any damage is found alike, by checksums
        path = tmp_path / "run"
        shutil.copytree(whole.path, path)
        _HARMS[harm](path / name)
        try:
            run = load_run(path)
            (which,) = [index for index, known in enumerate(whole.loaded) if _same_weights(run, known)]
            config = dataclasses.replace(run.config, budget="")
            if config != dataclasses.replace(
                whole.loaded[which].config, budget=""
            ):  # else it is the same by its inputs
                assert _evaluated(run, text) == pytest.approx(whole.scores[which], rel=1e-5)
            assert _generated(run) == whole.texts[which]
        except UserError as error:
            said[str(name)] = str(error)
        if not of_checkpoint or (harm == "flip" and name.suffix == ".json"):
            try:
                assert resume(path, budget=_MORE).summary["bits_per_byte"] in whole.resumed
            except UserError as error:
                said[f"{name}, resumed"] = str(error)
        shutil.rmtree(path)
    for name, message in said.items():
        assert "\n" not in message.strip() and len(message) < 700, (name, message)
    if harm in ("empty", "random"):
        assert {"config.yaml", "summary.json"} <= set(said) <= {"config.yaml", "summary.json", "config.yaml, resumed"}
