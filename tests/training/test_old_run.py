"""A run directory from before formats had a version, made by commit 27ded21: it is evaluated, used and resumed."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cramjax.errors import RunError
from cramjax.evaluation import evaluate_text
from cramjax.serve import generate
from cramjax.training import load_run, resume
from cramjax.training.checkpoint import FORMAT, list_checkpoints, read_meta

_OLD = Path(__file__).with_name("old_run")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, interrupted after 7 of 12 steps; its corpus is where it names it, in the working directory."""
    shutil.copytree(_OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_an_old_run_is_evaluated_and_continues_text(old: Path) -> None:
    run = load_run(old)
    # What that code said of it.
    assert sum(np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(run.params)) == pytest.approx(2301.1946)
    # Its precision is not written down, and this machine may choose bfloat16: three digits.
    assert evaluate_text(run).bits_per_byte == pytest.approx(4.380733, rel=1e-3)
    assert str(generate(run, "the ", max_tokens=6, temperature=0.0)[0]) == "the s s s "


@pytest.mark.slow
def test_an_old_run_is_resumed(old: Path) -> None:
    assert read_meta(list_checkpoints(old / "checkpoints")[-1]).format == 0
    before = load_run(old)
    run = resume(old)
    assert run.summary["steps"] == 12 and run.summary["bits_per_byte"] < evaluate_text(before).bits_per_byte
    assert read_meta(list_checkpoints(old / "checkpoints")[-1]).format == FORMAT
    assert (old / "config.yaml").read_text(encoding="utf-8").startswith(f"# cramjax run, format {FORMAT}\n")


def test_a_newer_format_is_named(old: Path) -> None:
    file = old / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(f"# cramjax run, format {FORMAT + 1}\nnever: heard of\n{text}", encoding="utf-8")
    for use in (load_run, resume):
        with pytest.raises(
            RunError, match=rf"run is of format {FORMAT + 1}, and this CramJAX knows formats to {FORMAT}"
        ):
            use(old)
    file.write_text(text, encoding="utf-8")
    newest = list_checkpoints(old / "checkpoints")[-1]
    meta = newest / "meta.json"
    changed = json.loads(meta.read_text(encoding="utf-8")) | {"format": FORMAT + 1, "never": "heard of"}
    meta.write_text(json.dumps(changed), encoding="utf-8")
    sums = {"meta.json": hashlib.sha256(meta.read_bytes()).hexdigest()}
    (newest / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    for use in (load_run, resume):
        with pytest.raises(RunError, match=rf"{newest.name} is of format {FORMAT + 1}"):
            use(old)
