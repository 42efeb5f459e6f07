"""The report of a run: one HTML file that needs nothing else, made from the files of the run directory alone.

It can be rebuilt at any time, also for a run that has not finished.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from matplotlib.figure import Figure

from cramjax.budget import Budget
from cramjax.cache import write_atomically
from cramjax.errors import RunError
from cramjax.show.numbers import format_seconds
from cramjax.training import plots
from cramjax.training.display import summary_figures
from cramjax.training.metrics import Record, read_records
from cramjax.training.run import read_summary


class _BudgetTable(NamedTuple):
    fraction: float
    rows: list[tuple[str, str]]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, from its `config.yaml`, `metrics.jsonl` and `summary.json`.

    Args:
        run_dir: the run directory; the last two files may be missing while the run goes on.

    Returns:
        The path of the report.

    Raises:
        RunError: the path is not a run directory, or its summary is damaged.
    """
    directory = Path(run_dir)
    file = directory / "config.yaml"
    if not file.is_file():
        raise RunError(f"{directory} is not a run directory (no config.yaml): give one that `cramjax train` printed.")
    path, records = directory / "report.html", read_records(directory)
    write_atomically(
        path,
        render_report(directory.resolve().name, file.read_text(encoding="utf-8"), records, read_summary(directory)),
    )
    return path


def render_report(name: str, config: str, records: list[Record], summary: Mapping[str, Any]) -> str:
    """The report as HTML.

    Args:
        name: what the run is called.
        config: its resolved configuration, as YAML.
        records: its `metrics.jsonl`.
        summary: its `summary.json`; empty while it goes on.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    values: dict[str, Any] = yaml.safe_load(config)
    baselines: dict[str, float] = summary.get("baselines") or {}
    masked = values["objective"]["kind"] == "masked"
    trained = any(record["kind"] in ("train", "evaluate") for record in records)
    last_step = max((record.get("step", 0) for record in records if record["kind"] == "sample"), default=0)
    figures = (
        plots.loss,
        plots.learning_rate,
        plots.throughput,
        plots.utilisation,
        plots.memory,
        plots.gradient_norm,
        plots.spending,
    )
    return environment.get_template("report.html.j2").render(
        name=name,
        lead=_lead(values, summary),
        cards=summary_figures(summary),
        budget=_budget(values["budget"], records, summary),
        comparison=_inline(plots.comparison({"this run": summary["bits_per_byte"], **baselines})) if baselines else "",
        masked=masked,
        main_curve=_inline(plots.score(records, {} if masked else baselines)) if trained else "",
        curves=[_inline(figure(records)) for figure in figures] if trained else [],
        # One for each prompt: a run that is finished again writes them again.
        samples=list(
            {r["prompt"]: r for r in records if r["kind"] == "sample" and r.get("step", 0) == last_step}.values()
        ),
        events=[r.get("message") or r["name"] for r in records if r["kind"] == "event"],
        config=config,
    )


def _inline(figure: Figure) -> str:
    """A figure whose ink is the page's, so that it is read on light and on dark paper."""
    return plots.svg_of(figure).replace(plots.INK, "currentColor")


def _lead(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    model, data = config["model"], config["data"]
    kind = "Masked" if config["objective"]["kind"] == "masked" else "Causal"
    named = (config.get("labels") or config.get("examples") or data)["source"]
    source = named if isinstance(named, str) else ", ".join(named)
    parts = [
        f"{kind} language model, {model['layers']} layers × {model['width']}, sequences of {data['sequence_length']}",
        f"trained on {source}",
    ]
    if summary.get("device"):
        devices = summary.get("devices", 1)
        parts.append(f"on {summary['device']}" + (f" × {devices}" if devices > 1 else ""))
    return " ".join(parts) + "."


def _budget(planned: str, records: list[Record], summary: Mapping[str, Any]) -> _BudgetTable:
    budget = Budget.parse(planned)
    if not summary:
        fraction = max((float(record.get("fraction", 0.0)) for record in records), default=0.0)
        return _BudgetTable(fraction, [("planned", str(budget)), ("spent so far", f"{fraction:.1%}")])
    spent = float(summary["budget_spent"])
    rows = [
        ("planned", str(budget)),
        ("spent", f"{Budget(spent, budget.unit)} ({spent / budget.amount:.2%} of the plan)"),
        ("schedule ended at", f"{summary['final_fraction']:.4f}"),
        ("training", format_seconds(summary["train_seconds"])),
        ("preparing data, not charged", format_seconds(summary["prepare_seconds"])),
    ]
    if summary.get("finish_seconds") is not None:
        rows.append(("final evaluation, not charged", format_seconds(summary["finish_seconds"])))
    return _BudgetTable(min(1.0, spent / budget.amount), rows)
