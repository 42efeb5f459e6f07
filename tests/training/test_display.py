"""The display says what the records say, in a terminal and in a pipe."""

import io

from rich.console import Console

from cramjax.training import display as d

TRAIN = {
    "kind": "train", "step": 120, "fraction": 0.25, "seconds": 45.0, "tokens": 491_520, "loss": 4.321,
    "bits_per_byte": 1.987, "lr": 3e-3, "tokens_per_second": 12_345.0, "mfu": 0.314, "memory_bytes": 700 * 2**20,
}  # fmt: skip
EVALUATE = {"kind": "evaluate", "step": 120, "fraction": 0.25, "loss": 4.0, "bits_per_byte": 1.75, "accuracy": None}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, legacy_windows=False)


def text_of(c: Console) -> str:
    assert isinstance(c.file, io.StringIO)
    return c.file.getvalue()


def test_the_place_decides_the_display():
    assert isinstance(d.make_display(console(True)), d.LiveDisplay)
    assert isinstance(d.make_display(console(False)), d.PlainDisplay)
    assert isinstance(d.make_display(quiet=True), d.QuietDisplay)


def test_the_live_panel_shows_every_figure():
    c = console(False)
    c.print(d.render_panel(TRAIN, [EVALUATE, {**EVALUATE, "bits_per_byte": 1.5}]))
    shown = text_of(c)
    for part in ("25.0%", "2m15s left", "4.321", "1.987", "3.00e-03", "12.3k", "31.4%", "700 MiB", "1.500"):
        assert part in shown


def test_live_display_draws_in_place_and_keeps_messages():
    c = console(True)
    with d.LiveDisplay(c) as live:
        live.record({"kind": "event", "name": "x", "message": "the data will repeat"})
        live.record(TRAIN)
        live.record(EVALUATE)
    shown = text_of(c)
    assert "the data will repeat" in shown and "25.0%" in shown and "1.750" in shown


def test_plain_lines_are_occasional_but_evaluations_always_show():
    c = console(False)
    with d.PlainDisplay(c, seconds=3600.0) as plain:
        for step in range(50):
            plain.record({**TRAIN, "step": step})
        plain.record(EVALUATE)
        plain.record({"kind": "sample", "prompt": "", "text": "hidden"})
        plain.message("[bold] is not markup")
    lines = text_of(c).splitlines()
    assert len(lines) == 3
    assert "step 0" in lines[0]
    assert "held out" in lines[1] and "bits/byte 1.750" in lines[1] and "accuracy" not in lines[1]
    assert lines[2] == "[bold] is not markup"


def test_a_record_without_optional_figures_still_shows():
    bare = {"kind": "train", "step": 0, "fraction": 0.0, "seconds": 0.0, "loss": 8.3, "mfu": None}
    assert "loss 8.300" in d.plain_line(bare) and "left" not in d.plain_line(bare)
    c = console(False)
    c.print(d.render_panel(bare, []))
    assert "8.300" in text_of(c)
