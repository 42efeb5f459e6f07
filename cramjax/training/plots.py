"""Figures of a run, drawn from the records of its `metrics.jsonl`: for the report, and for `.plot()` in a notebook.

The report replaces the colour `INK` of text, axes and grid by the page's own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cramjax.show import figures
from cramjax.show.figures import BLUE, GREEN, INK, ORANGE, PURPLE, RED, single, styled
from cramjax.show.figures import Plot as Plot
from cramjax.show.figures import svg_of as svg_of
from cramjax.show.numbers import format_bytes, format_count

Records = Sequence[Mapping[str, Any]]


def column(records: Records, kind: str, y: str, x: str = "fraction") -> tuple[list[float], list[float]]:
    """The values of two fields over the records of one kind that have both, finite.

    Args:
        records: records of `metrics.jsonl`.
        kind: which records.
        y: the second field.
        x: the first field.
    """
    points = [(r[x], r[y]) for r in records if r["kind"] == kind and r.get(x) is not None and r.get(y) is not None]
    points = [(float(a), float(b)) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    return [a for a, _ in points], [b for _, b in points]


def curves(records: Records, baselines: Mapping[str, float] | None = None) -> Figure:
    """The score, and the learning rate, over the budget: the two a reader looks at first.

    Args:
        records: records of `metrics.jsonl`.
        baselines: bits per byte of other compressors of the same held-out text, drawn as lines.
    """
    with styled():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[2, 1])
        draw_score(left, records, baselines)
        draw_metric(right, records, "lr", "Learning rate", colour=PURPLE)
    return figure


def score(records: Records, baselines: Mapping[str, float] | None = None) -> Figure:
    """The score over the spent fraction; see `draw_score`."""
    return single((9, 3.6), lambda axes: draw_score(axes, records, baselines))


def loss(records: Records) -> Figure:
    """Loss over the spent fraction, in training and held out: in nats per token, where tokens are predicted."""

    def draw(axes: Axes) -> None:
        _line(axes, *column(records, "train", "loss"), colour=BLUE, label="training")
        _line(axes, *column(records, "evaluate", "loss"), colour=ORANGE, label="held out", marker="o")
        _finish(axes, "Loss (nats per token)" if _in_bytes(records) else "Loss")
        _legend(axes)

    return single((4.4, 2.9), draw)


def learning_rate(records: Records) -> Figure:
    """The learning rate over the spent fraction."""
    return single((4.4, 2.9), lambda axes: draw_metric(axes, records, "lr", "Learning rate", colour=PURPLE))


def throughput(records: Records) -> Figure:
    """Training tokens per second over the spent fraction."""
    return single(
        (4.4, 2.9),
        lambda axes: draw_metric(
            axes, records, "tokens_per_second", "Tokens per second", colour=GREEN, form=format_count, zero=True
        ),
    )


def utilisation(records: Records) -> Figure:
    """Model FLOP utilisation over the spent fraction."""
    return single(
        (4.4, 2.9),
        lambda axes: draw_metric(
            axes, records, "mfu", "Model FLOP utilisation", colour=GREEN, form=lambda v: f"{v:.0%}", zero=True
        ),
    )


def memory(records: Records) -> Figure:
    """Peak memory over the spent fraction."""
    return single(
        (4.4, 2.9),
        lambda axes: draw_metric(
            axes, records, "memory_bytes", "Memory at the peak", colour=RED, form=format_bytes, zero=True
        ),
    )


def gradient_norm(records: Records) -> Figure:
    """Global gradient norm, before clipping, over the spent fraction."""
    return single((4.4, 2.9), lambda axes: draw_metric(axes, records, "grad_norm", "Gradient norm", colour=BLUE))


def spending(records: Records) -> Figure:
    """Tokens read against time spent: a straight line when the machine kept its speed."""

    def draw(axes: Axes) -> None:
        seconds, tokens = column(records, "train", "tokens", x="seconds")
        _line(axes, seconds, tokens, colour=BLUE)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: format_count(v)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds spent")
        axes.set_title("Tokens read")

    return single((4.4, 2.9), draw)


def comparison(scores: Mapping[str, float]) -> Figure:
    """Bars of bits per byte, one per compressor of the same held-out text; the first is this run.

    Args:
        scores: bits per byte by name.
    """
    names, values = list(scores), list(scores.values())
    colours = [BLUE] + [INK] * (len(names) - 1)

    def draw(axes: Axes) -> None:
        bars = axes.barh(names, values, color=colours, height=0.62)
        axes.bar_label(bars, labels=[f" {value:.3f}" for value in values], padding=2)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.15)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_title("Bits per byte of the held-out text (lower is better)")

    return single((9, 0.6 + 0.42 * len(names)), draw)


def parts_of_a_step(shares: Mapping[str, float]) -> Figure:
    """Horizontal bars of the share of each part of the model in a step's time, forward and backward beside each other.

    Args:
        shares: by part; those of the backward pass end in `(backward)`.
    """
    passes = ("", " (backward)")
    parts = list(dict.fromkeys(part.removesuffix(passes[1]) for part in shares))
    parts.sort(key=lambda part: -sum(shares.get(part + each, 0.0) for each in passes))

    def draw(axes: Axes) -> None:
        percent = {
            label: [100 * shares.get(part + each, 0.0) for part in parts]
            for each, label in zip(passes, ("forward", "backward"), strict=True)
        }
        figures.stacked_bars(axes, parts, percent, (BLUE, ORANGE))
        axes.set_xlabel("% of the time of all threads")
        axes.set_title("Where a step's time goes")
        axes.legend(labelcolor=INK, loc="lower right")

    return single((9, 1.2 + 0.36 * len(parts)), draw)


def draw_score(axes: Axes, records: Records, baselines: Mapping[str, float] | None) -> None:
    """Draw bits per byte and the baselines; of labels and preferences, which have none, held-out accuracy."""
    fractions, shares = column(records, "evaluate", "accuracy")
    if _in_bytes(records) or not shares:
        draw_bits_per_byte(axes, records, baselines)
        return
    _line(axes, fractions, shares, colour=ORANGE, label="held out", marker="o")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    _finish(axes, "Accuracy")
    _legend(axes)


def _in_bytes(records: Records) -> bool:
    """Whether a run predicts text, so that its loss is one per token and per byte."""
    return any(record.get("bits_per_byte") is not None for record in records)


def draw_bits_per_byte(axes: Axes, records: Records, baselines: Mapping[str, float] | None) -> None:
    """Draw bits per byte and the baselines on axes given."""
    _line(axes, *column(records, "train", "bits_per_byte"), colour=BLUE, label="training")
    x, y = column(records, "evaluate", "bits_per_byte")
    _line(axes, x, y, colour=ORANGE, label="held out", marker="o")
    for number, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(value, color=INK, linewidth=1, linestyle="--")
        right = 0.995 - 0.12 * number  # side by side, since two lines may lie on each other
        axes.annotate(name, (right, value), ha="right", va="bottom", fontsize=8, xycoords=("axes fraction", "data"))
    seen = column(records, "train", "bits_per_byte")[1]
    shown = sorted([*seen[len(seen) // 20 :], *y[1:], *(baselines or {}).values()])
    if shown:  # the first moments are far above everything else and would flatten it
        axes.set_ylim(shown[0] - 0.08 * (shown[-1] - shown[0] + 0.1), shown[-1] + 0.08 * (shown[-1] - shown[0] + 0.1))
    _finish(axes, "Bits per byte")
    _legend(axes)


def draw_metric(
    axes: Axes,
    records: Records,
    name: str,
    title: str,
    *,
    colour: str,
    form: Callable[[float], str] | None = None,
    zero: bool = False,
) -> None:
    """Draw one training metric on axes given.

    Args:
        axes: where.
        records: records of `metrics.jsonl`.
        name: the metric's field.
        title: what a reader calls it.
        colour: of the line.
        form: writes the tick labels.
        zero: let the vertical axis start at zero.
    """
    _line(axes, *column(records, "train", name), colour=colour)
    if form is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: form(v)))
    if zero:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    _finish(axes, title)


def _line(
    axes: Axes,
    x: Iterable[float],
    y: Iterable[float],
    *,
    colour: str,
    label: str | None = None,
    marker: str | None = None,
) -> None:
    axes.plot(list(x), list(y), color=colour, label=label, marker=marker, markersize=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    figures.budget_axis(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, labelcolor=INK)
