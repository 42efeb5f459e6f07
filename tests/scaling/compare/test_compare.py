"""Comparisons of two recipes: the order of runs, what is kept, what is refused, and what the result says."""

import dataclasses
import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

import cramjax
from cramjax import cli
from cramjax.config import RunConfig
from cramjax.errors import ConfigError, RunError
from cramjax.recipes import override, to_yaml
from cramjax.scaling.child import run_lock
from cramjax.scaling.compare import run as module
from cramjax.scaling.compare.comparison import ACCURACY, Comparison, Outcome, Pair
from cramjax.scaling.compare.display import ComparisonDisplay
from cramjax.scaling.compare.plots import mean_curve
from cramjax.scaling.compare.run import compare
from cramjax.training import train
from cramjax.training.signals import Signals

TINY: dict[str, Any] = {
    "budget": "4steps",
    "tokenizer": {"vocab_size": 300},
    "model": {"layers": 1, "width": 32, "heads": 2, "mlp": 64},
    "batch": {"size": 8},
    "evaluate": {"points": 2, "tokens": 1024, "batch": 8, "samples": ["the [MASK] walks"]},
    "checkpoint": {"points": 1},
    "train": {"data_parallel": 1, "compute_dtype": "float32"},
}


@pytest.fixture
def a(corpus: Path, cache_directory: Path) -> RunConfig:
    data = {"source": str(corpus / "*.txt"), "sequence_length": 32, "validation_fraction": 0.2}
    return cramjax.recipe("quickstart", data=data, **TINY)


@pytest.fixture
def b(a: RunConfig) -> RunConfig:
    return override(a, ["optim.lr=0.01"])


class Children:
    """Stands in for child processes: notes each, and leaves what `act` says."""

    def __init__(self, a: RunConfig):
        self.a_lr, self.calls, self.configs, self.found = a.optim.lr, [], [], []
        self.before: dict[str, Callable[[], None]] = {}
        self.act: Callable[[int, str, Signals], float | str | None] = lambda seed, side, signals: None

    def __call__(self, path: Path, config: RunConfig, signals: Signals, display: object) -> str | None:
        side = "a" if config.optim.lr == self.a_lr else "b"
        if config.budget == "1steps":
            self.calls.append(f"compile {side}")
            self.before.get(self.calls[-1], lambda: None)()
            return None
        assert path.name == side and path.parent.name == f"seed-{config.seed}"
        self.calls.append(f"{config.seed}{side}")
        self.configs.append(config)
        self.found.append(path.exists())
        done = self.act(config.seed, side, signals)
        if isinstance(done, str):
            return done
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").touch()
        if signals.received is None:
            score = {"a": 1.5, "b": 1.4 + 0.02 * config.seed}[side] if done is None else done
            summary = {"bits_per_byte": score, "loss": score, "tokens": 1024, "steps": 4, "train_seconds": 2.5}
            (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return None


@pytest.fixture
def children(a: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children(a)
    monkeypatch.setattr(module, "_spawn", made)
    return made


def test_pairs_share_a_seed_and_their_order_alternates(a: RunConfig, b: RunConfig, children: Children, tmp_path: Path):
    a, b = dataclasses.replace(a, seed=3), dataclasses.replace(b, seed=8)
    found = compare(a, b, tmp_path / "out", seeds=3, names=("plain", "fast"))
    assert children.calls == ["compile a", "compile b", "3a", "3b", "4b", "4a", "5a", "5b"]
    assert children.configs[0] == a and children.configs[1] == dataclasses.replace(b, seed=3)
    assert found.differing == {"optim.lr": (a.optim.lr, 0.01)}
    assert found.difference is not None and found.difference.mean == pytest.approx(1.48 - 1.5)
    assert found.difference.std == pytest.approx(0.02)  # of −0.04, −0.02 and 0
    written = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.json()))
    assert [p["b"]["score"] for p in written["pairs"]] == pytest.approx([1.46, 1.48, 1.5])
    assert written["mean"] == pytest.approx(-0.02) and written["seeds_to_settle"] == 7 and not written["settled"]
    assert written["held_out"]["bytes"] > 0 and written["pairs"][0]["a"]["tokens"] == 1024


def test_a_comparison_goes_on_to_more_seeds(a: RunConfig, b: RunConfig, children: Children, tmp_path: Path):
    compare(a, b, tmp_path, seeds=1)
    children.calls.clear()
    more = compare(a, b, tmp_path, seeds=2)
    assert children.calls == ["compile a", "compile b", "1b", "1a"]
    children.calls.clear()
    assert compare(a, b, tmp_path, seeds=2).json() == more.json() and children.calls == []


@pytest.mark.parametrize(("budget", "kept"), [("4steps", True), ("1ktok", True), ("10s", False)])
def test_a_stopped_run_is_resumed_unless_its_budget_is_a_time(
    a: RunConfig, b: RunConfig, children: Children, tmp_path: Path, budget: str, kept: bool
):
    def stop(seed: int, side: str, signals: Signals) -> None:
        signals.received = signal.SIGINT if (seed, side) == (1, "b") else None

    a, b = dataclasses.replace(a, budget=budget), dataclasses.replace(b, budget=budget)
    children.act = stop
    stopped = compare(a, b, tmp_path, seeds=2)
    assert stopped.interrupted_by == signal.SIGINT
    assert children.calls[2:] == ["0a", "0b", "1b"]
    assert stopped.pairs[1] == Pair(1, None, None) and "2 of 4 runs are still to be done." in stopped.notes
    assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["pairs_counted"] == 1

    children.act, children.calls, children.found = lambda *_: None, [], []
    whole = compare(a, b, tmp_path, seeds=2)
    assert children.calls[2:] == ["1b", "1a"] and children.found == [kept, False]
    assert whole.interrupted_by is None and whole.difference is not None and whole.difference.pairs == 2


def test_a_run_that_an_orphan_still_writes_is_waited_for(
    a: RunConfig, b: RunConfig, children: Children, tmp_path: Path
):
    """The comparison was killed; its child has not noticed yet, and comes to its end."""
    path = tmp_path / "seed-0" / "a"
    path.mkdir(parents=True)
    (tmp_path / "a.yaml").write_text(to_yaml(a), encoding="utf-8")
    held, go = threading.Event(), threading.Event()

    def orphan() -> None:
        with run_lock(path):
            held.set()
            go.wait(60)
            time.sleep(0.3)
            summary = {"bits_per_byte": 1.25, "loss": 1.25, "tokens": 1024, "steps": 4, "train_seconds": 2.5}
            (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    threading.Thread(target=orphan, daemon=True).start()
    assert held.wait(60)
    children.before["compile b"] = go.set
    found = compare(a, b, tmp_path, seeds=1)
    assert children.calls == ["compile a", "compile b", "0b"]
    assert found.pairs[0].a is not None and found.pairs[0].a.score == 1.25


def test_a_directory_that_another_comparison_took_meanwhile_is_refused(
    a: RunConfig, b: RunConfig, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, prepared = tmp_path / "out", module._common_text

    def slowly(*given: Any) -> Any:
        monkeypatch.setattr(module, "_common_text", prepared)
        compare(a, override(a, ["optim.lr=0.05"]), out, seeds=1)
        children.calls.clear()
        return prepared(*given)

    monkeypatch.setattr(module, "_common_text", slowly)
    with pytest.raises(RunError, match="is another comparison: its b.yaml is not what B is now"):
        compare(a, b, out, seeds=1)
    assert children.calls == []


def test_a_failed_run_is_recorded_and_its_pair_does_not_count(
    a: RunConfig, b: RunConfig, children: Children, tmp_path: Path
):
    acts: dict[tuple[int, str], float | str] = {(0, "b"): "training stopped being finite", (2, "a"): float("nan")}
    children.act = lambda seed, side, signals: acts.get((seed, side))
    found = compare(a, b, tmp_path, seeds=4)
    assert children.calls[2:] == ["0a", "0b", "1b", "1a", "2a", "2b", "3b", "3a"]
    assert found.pairs[0].b == Outcome(failure="training stopped being finite")
    assert found.pairs[2].a is not None and found.pairs[2].a.failure == "its held-out loss is nan"
    assert found.difference is not None and found.difference.pairs == 2
    assert found.difference.mean == pytest.approx((-0.08 - 0.04) / 2)
    assert "seed 0, B failed, so the pair does not count: training stopped being finite" in str(found)
    children.calls.clear()
    compare(a, b, tmp_path, seeds=4)
    assert children.calls == []  # it would fail again
    shutil.rmtree(tmp_path / "seed-0" / "b")
    compare(a, b, tmp_path, seeds=4)
    assert children.calls[2:] == ["0b"]


def test_a_recipe_that_cannot_take_a_step_is_an_error(
    a: RunConfig, b: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(module, "_spawn", lambda path, config, *_: None if config == b else "no memory")
    with pytest.raises(RunError, match="A cannot run: no memory"):
        compare(a, b, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective.kind=masked"], "A is causal and B is masked"),
        (["budget=8steps"], "A has a budget of 4steps and B of 8steps"),
        (["data.validation_fraction=0.3"], r"hold out different text \(data.validation_fraction: 0.2 → 0.3\)"),
        (["data.normalize=ascii_lower", "data.min_chars=2384"], "hold out different text"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    a: RunConfig, children: Children, tmp_path: Path, changes: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        compare(a, override(a, changes), tmp_path / "out")
    assert children.calls == [] and not (tmp_path / "out").exists()


def test_masked_models_are_compared_at_one_masked_share(a: RunConfig, children: Children, tmp_path: Path):
    a = override(a, ["objective.kind=masked", "objective.mask_rate=0.2"])
    with pytest.raises(ConfigError, match=r"scored with 0\.2 .* B with 0\.4"):
        compare(a, override(a, ["objective.mask_rate_end=0.4"]), tmp_path)
    b = override(a, ["objective.mask_rate=0.4", "objective.mask_rate_end=0.2", "optim.lr=0.01"])
    assert compare(a, b, tmp_path, seeds=1).objective == "masked"


def test_different_tokenizers_and_the_same_text_may_be_compared(a: RunConfig, children: Children, tmp_path: Path):
    b = override(a, ["tokenizer.kind=bytes", "optim.lr=0.01"])
    assert "tokenizer.kind" in compare(a, b, tmp_path, seeds=1).differing


def test_a_comparison_of_before_a_field_existed_goes_on(a: RunConfig, b: RunConfig, children: Children, tmp_path: Path):
    compare(a, b, tmp_path, seeds=1)
    for side in ("a", "b"):
        file = tmp_path / f"{side}.yaml"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("start_from: null\n", ""), encoding="utf-8")
        assert file.read_text(encoding="utf-8") != text
    assert len(compare(a, b, tmp_path, seeds=2).pairs) == 2


def test_a_directory_of_something_else_is_refused(a: RunConfig, b: RunConfig, children: Children, tmp_path: Path):
    compare(a, b, tmp_path / "out", seeds=1)
    with pytest.raises(RunError, match="is another comparison: its b.yaml is not what B is now"):
        compare(a, override(a, ["optim.lr=0.02"]), tmp_path / "out")
    with pytest.raises(RunError, match="exists already and is no comparison"):
        compare(a, b, tmp_path)
    with pytest.raises(ConfigError, match="seeds must be 1 or more, got 0"):
        compare(a, b, tmp_path / "other", seeds=0)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(RunError, match="is in use by another process"):
        compare(a, b, tmp_path / "out")
    record = tmp_path / "out" / "comparison.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"sha256": "', '"sha256": "0'), encoding="utf-8")
    with pytest.raises(RunError, match="held-out text of .* has changed since"):
        compare(a, b, tmp_path / "out")


def comparison(*differences: float, path: Path = Path("x")) -> Comparison:
    pairs = (
        Pair(i, Outcome(1.5, 10, 1, 1.0), None if np.isnan(d) else Outcome(1.5 + d, 10, 1, 1.0))
        for i, d in enumerate(differences)
    )
    return Comparison("one", "other", "5min", "causal", {"optim.lr": (1, 2)}, tuple(pairs), path, {"bytes": 1})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        # t = 12.7062 for one degree of freedom, s/√2 = 0.001: ±0.0127.
        ((-0.031, -0.029), "B is better: B − A is −0.0300 bits per byte (95% interval −0.0427 to −0.0173, 2 pairs)"),
        ((0.029, 0.031), "A is better: B − A is +0.0300 bits per byte (95% interval +0.0173 to +0.0427, 2 pairs)"),
        (
            (-0.02, 0.0),
            "not settled: B − A is −0.0100 bits per byte (95% interval −0.1371 to +0.1171, 2 pairs); about 11 pairs "
            "would settle a difference of this size",
        ),
        ((-0.5, 0.5), "2 pairs); no number of pairs would settle a mean of 0"),
        ((-0.02,), "one pair: B − A is −0.0200 bits per byte. One pair has no interval: give --seeds 2 or more."),
        ((float("nan"),), "nothing to compare: no pair has two finished runs."),
    ],
)
def test_the_verdict_is_a_sentence(differences: tuple[float, ...], verdict: str):
    found = comparison(*differences)
    assert found.verdict.endswith(verdict) or found.verdict == verdict
    assert str(found).startswith("A: one. B: other. Budget 5min, held-out bits per byte\nseed ")
    assert str(found).endswith(found.verdict) and found.verdict in found._repr_html_()


def test_more_accuracy_is_better():
    found = dataclasses.replace(comparison(0.029, 0.031), measure=ACCURACY)
    assert found.verdict.startswith("B is better: B − A is +0.0300 accuracy (95% interval +0.0173 to +0.0427")
    assert dataclasses.replace(comparison(-0.029, -0.031), measure=ACCURACY).verdict.startswith("A is better")


def test_small_differences_keep_two_digits_of_their_interval():
    assert "(95% interval −0.000043 to −0.000017, 2 pairs)" in comparison(-0.000031, -0.000029).verdict


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (2, "warning: slow\nerror: training stopped being finite\n", "training stopped being finite"),
        (1, "Traceback …\nValueError: no\n", "exit code 1: ValueError: no"),
        (-9, "", "ended by SIGKILL"),
        (143, "", "ended by SIGTERM"),
    ],
)
def test_a_failure_has_a_reason(code: int, log: str, reason: str):
    assert module._why(code, log) == reason


def test_mean_curves_are_over_the_pairs_that_count(tmp_path: Path):
    """Straight lines of different grids have the mean of their ends and slopes."""
    found = comparison(-0.1, -0.2, float("nan"), path=tmp_path)
    for seed, fractions, slope in ((0, (0.25, 0.5, 1.0), 2.0), (1, (0.5, 1.0), 4.0), (2, (0.1, 1.0), 100.0)):
        for side in ("a", "b"):
            (tmp_path / f"seed-{seed}" / side).mkdir(parents=True)
            (tmp_path / f"seed-{seed}" / side / "metrics.jsonl").write_text(
                "".join(
                    json.dumps({"kind": "evaluate", "fraction": f, "bits_per_byte": 9 - slope * f}) + "\n"
                    for f in fractions
                ),
                encoding="utf-8",
            )
    fractions, means = mean_curve(found, "b")
    assert fractions[0] == 0.5 and fractions[-1] == 1.0
    np.testing.assert_allclose(means, 9 - 3 * fractions, rtol=1e-12)
    ElementTree.fromstring(found.plot()._repr_svg_())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cramjax compare needs two recipes, or one and --with FIELD=VALUE."),
        (["gpt-mini"], "cramjax compare needs two recipes, or one and --with FIELD=VALUE."),
        (["gpt-mini", "gpt-mimi"], "did you mean gpt-mini?"),
        (["gpt-mini", "--with", "optim.lrr=1"], "unknown option --optim.lrr; did you mean --optim.lr?"),
        (["gpt-mini", "--with", "optim.lr=1", "--json", "no/such/file"], "cannot write no/such/file"),
        (["gpt-mini", "quickstart"], "A has a budget of 5min and B of 3min: give both the same one, as --budget."),
        (["gpt-mini", "crammed-bert-mini"], "A is causal and B is masked"),
    ],
)
def test_mistakes_are_one_sentence(words, message, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_prints_what_there_is(monkeypatch, capsys: pytest.CaptureFixture[str]):
    stopped = dataclasses.replace(comparison(-0.03), interrupted_by=int(signal.SIGINT))
    given: list[Any] = []
    monkeypatch.setattr(cramjax, "compare", lambda *a, **k: (given.append((a, k)), stopped)[1])
    words = ["compare", "gpt-mini", "--with", "optim.lr=0.03", "batch.size=16", "--seeds=7", "--budget=1min"]
    assert cli.main(words) == 130
    printed = capsys.readouterr()
    assert "one pair: B − A is −0.0300" in printed.out and "--out x" in printed.err
    changes = ["optim.lr=0.03", "batch.size=16"]
    assert given == [(("gpt-mini", None), {"changes": changes, "out": None, "seeds": 7, "budget": "1min"})]


def test_a_comparison_without_a_pair_is_an_error_after_it_is_printed(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(cramjax, "compare", lambda *a, **k: comparison(float("nan")))
    assert cli.main(["compare", "gpt-mini", "--with", "optim.lr=0.03"]) == 2
    printed = capsys.readouterr()
    assert "A: one. B: other." in printed.out
    assert printed.err.startswith("error: nothing to compare") and printed.err.count("\n") == 1


def test_changes_are_of_b_alone(monkeypatch, capsys: pytest.CaptureFixture[str]):
    """A's head is tied and can have no rate of its own."""
    monkeypatch.setattr(cramjax, "compare", lambda *a, **k: comparison(-0.03, -0.031))
    assert cli.main(["compare", "crammed-bert", "gpt-mini", "--with", "optim.head_lr=0.01"]) == 0, capsys.readouterr()


@pytest.mark.slow
def test_children_reach_what_training_here_reaches(a: RunConfig, tmp_path: Path):
    found = cramjax.compare(a, changes={"optim": {"lr": 0.01}}, seeds=1, out=tmp_path / "pair", quiet=True)
    alone = train(override(a, ["optim.lr=0.01"]), tmp_path / "alone")
    (pair,) = found.pairs
    assert pair.a is not None and pair.b is not None and found.b == "A with optim.lr=0.01"
    assert pair.b.score == alone.summary["bits_per_byte"] != pair.a.score
    assert pair.b.tokens == 4 * 8 * 32 and pair.b.steps == 4
    assert not list((tmp_path / "pair").rglob("*.log")) and not list((tmp_path / "pair").glob(".warm-up-*"))


def test_the_display_is_live_in_a_terminal_and_lines_elsewhere(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "fraction": 0.25, "seconds": 30.0, "loss": 2.5}\n', encoding="utf-8"
    )
    shown = []
    for terminal in (True, False):
        buffer = io.StringIO()
        with ComparisonDisplay(Console(file=buffer, force_terminal=terminal, width=140)) as display:
            display.running("seed 1, B")
            display.progress(tmp_path)
            display.ended(Outcome(1.25, 1024, 4, 2.5))
            display.results(comparison(-0.03))
        shown.append(buffer.getvalue())
    assert "25.0%  1m30s left" in shown[0] and "one pair: B − A is −0.0300" in shown[0]
    assert shown[1] == "seed 1, B …\nseed 1, B: 1.2500 bits per byte, 1,024 tokens in 2.5 s\n"
