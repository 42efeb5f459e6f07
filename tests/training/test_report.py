"""The report holds what the run's files hold, in one file that needs nothing else."""

import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cramjax.config import ObjectiveConfig, RunConfig
from cramjax.errors import RunError
from cramjax.training import plots
from cramjax.training.report import write_report

SUMMARY = {
    "bits_per_byte": 1.2345, "loss": 2.5, "perplexity": 12.18, "accuracy": 0.41, "params": 1_234_567,
    "tokens": 3_000_000, "steps": 1500, "epochs": 0.4, "flops": 2.1e13, "tokens_per_second": 16_800.0, "mfu": 0.3,
    "memory_bytes": 2**30, "budget": "3min", "budget_spent": 180.4, "final_fraction": 1.0, "train_seconds": 180.4,
    "prepare_seconds": 12.0, "finish_seconds": 3.0, "device": "Test CPU, 2 cores", "devices": 1,
    "baselines": {"xz": 2.1, "unigram": 3.9, "bigram": 2.9},
}  # fmt: skip
DEFAULT = RunConfig()


def records(count: int = 40) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for i in range(1, count + 1):
        f = i / count
        where = {"step": 10 * i, "fraction": f, "seconds": 180 * f, "tokens": 75_000 * i, "flops": 1e12 * i}
        loss = 2.3 + 6 * math.exp(-6 * f)
        speeds = {"lr": 3e-3 * (1 - f), "grad_norm": 0.5 / f, "batch_size": 32, "memory_bytes": 7e8}
        rates = {"tokens_per_second": 16_000 + 500 * math.sin(i), "mfu": 0.3}
        out.append({"kind": "train", **where, "loss": loss, "bits_per_byte": loss / 2, **speeds, **rates})
        if i % 8 == 0:
            scores = {"loss": loss + 0.1, "bits_per_byte": loss / 2 + 0.05, "perplexity": 9.0, "accuracy": 0.4}
            out.append({"kind": "evaluate", **where, **scores})
    out.append({"kind": "event", "name": "repeats", "message": "the data will repeat <twice>"})
    out.append({"kind": "sample", "step": 5, "prompt": "old", "text": "stale"})
    out.append({"kind": "sample", "step": 400, "prompt": "def <f>", "text": "(x):\n    return x & 1"})
    return out


def run_dir(tmp_path: Path, summary: dict | None = SUMMARY, config: RunConfig = DEFAULT) -> Path:
    path = tmp_path / "my-run"
    path.mkdir()
    (path / "config.yaml").write_text(
        yaml.safe_dump(dataclasses.asdict(config) | {"evaluate": {"samples": [""]}}), encoding="utf-8"
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()), encoding="utf-8")
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Collects text and every address a browser would fetch."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.fetched, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.fetched.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_shows_the_run_and_fetches_nothing(tmp_path: Path):
    html = write_report(run_dir(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    for shown in ("my-run", "1.234", "12.2", "41.0%", "1.23M", "16.8k", "30.0%", "1.00 GiB", "Test CPU, 2 cores"):
        assert shown in page.text, shown
    for shown in ("3min", "180.4s (100.22% of the plan)", "12s", "xz", "unigram", "bigram", "2.100", "sequence_length"):
        assert shown in page.text, shown
    assert "def <f>(x):\n    return x & 1" in page.text and "the data will repeat <twice>" in page.text
    assert "stale" not in page.text  # only the samples of the newest weights
    assert page.tags.count("svg") == 9
    assert plots.INK not in html and "currentColor" in html and "prefers-color-scheme: dark" in html
    assert "compare them among masked models" not in page.text
    assert page.fetched == [] and "script" not in page.tags and "@import" not in html and "url(http" not in html


def test_it_can_be_rebuilt_and_is_the_same(tmp_path: Path):
    path = run_dir(tmp_path)
    first = write_report(path).read_bytes()
    assert write_report(path).read_bytes() == first


def test_a_run_that_goes_on_has_a_report(tmp_path: Path):
    path = run_dir(tmp_path, summary=None)
    page = Page(write_report(path).read_text(encoding="utf-8"))
    assert "spent so far" in page.text and "100.0%" in page.text and page.tags.count("svg") == 8
    (path / "metrics.jsonl").unlink()
    assert "No metrics have been logged yet" in write_report(path).read_text(encoding="utf-8")


def test_a_masked_run_says_that_its_bits_are_not_comparable(tmp_path: Path):
    masked = RunConfig(objective=ObjectiveConfig(kind="masked"))
    html = write_report(run_dir(tmp_path, config=masked)).read_text(encoding="utf-8")
    assert "compare them among masked models" in html


def test_not_a_run_directory(tmp_path: Path):
    with pytest.raises(RunError, match="is not a run directory"):
        write_report(tmp_path)


def test_columns_leave_out_what_is_missing_or_not_finite():
    lines = [
        {"kind": "train", "fraction": 0.1, "mfu": None},
        {"kind": "train", "fraction": 0.2, "mfu": 0.5},
        {"kind": "train", "fraction": 0.3, "mfu": float("nan")},
        {"kind": "evaluate", "fraction": 0.4, "mfu": 0.7},
    ]
    assert plots.column(lines, "train", "mfu") == ([0.2], [0.5])


def test_lines_carry_the_data():
    lines = records()
    axes = plots.loss(lines).axes[0]
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    expected = [(r["fraction"], r["loss"]) for r in lines if r["kind"] == "evaluate"]
    assert drawn["held out"].tolist() == [list(point) for point in expected]
    bars = plots.comparison({"this run": 1.2, "xz": 2.4}).axes[0].patches
    assert [bar.get_width() for bar in bars] == [1.2, 2.4]


def test_plot_shows_and_saves_itself(tmp_path: Path):
    plot = plots.Plot(plots.curves(records(), {"xz": 2.1}))
    ElementTree.fromstring(plot._repr_svg_().replace("xlink:href", "href"))  # well-formed
    plot.save(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
