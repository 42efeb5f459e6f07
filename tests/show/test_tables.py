"""Pages of tables: the same text in a notebook, readable in a narrow terminal, escaped in HTML."""

from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.text import Text

from cramjax.show.tables import Grid, Page, Row, warning
from cramjax.show.values import Viewed

COLUMNS = ("policy", "micro", "device", "fits")
ROWS = [
    Row(("selective+offload_optimizer", "128", "23.95 GiB", "best"), "bold"),
    ("none", "8", "9.50 GiB", "no"),
]


@dataclass(frozen=True, repr=False)
class Value(Viewed):
    """A value with a view."""

    parts: tuple[Grid | Text | str, ...]

    def __rich__(self) -> Page:
        return Page(self.parts)


def at_width(value: object, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(value)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_text_is_the_same_in_a_notebook(monkeypatch: pytest.MonkeyPatch):
    value = Value((Grid("Title", ["", "best"], [["loss", "2.5"]]), warning("take care")))
    plain = str(value)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(value) == plain == repr(value)
    assert "2.5" in plain and "warning: take care" in plain


def test_a_wide_terminal_gets_a_table_and_a_narrow_one_a_list_with_every_figure():
    grid = Grid("Policies", COLUMNS, ROWS, left=("fits",))
    wide = at_width(Page([grid]), 100)
    assert wide[0] == "Policies" and list(COLUMNS) in [line.split() for line in wide]
    assert "selective+offload_optimizer 128 23.95 GiB best".split() in [line.split() for line in wide]
    narrow = at_width(Page([grid]), 40)
    assert narrow == [
        "Policies",
        "selective+offload_optimizer",
        "  micro\xa0128, device\xa023.95\xa0GiB, fits\xa0best",
        "none",
        "  micro\xa08, device\xa09.50\xa0GiB, fits\xa0no",
    ]
    assert all(len(line) <= 30 for line in at_width(Page([grid]), 30))


def test_rows_that_share_a_heading_say_it_once():
    grid = Grid("", ("kernel", "case", "by", "ms"), [("norm", "rms", "xla", "1"), ("", "", "pallas", "2")], headings=2)
    assert at_width(grid, 14) == ["norm  rms", "  by\xa0xla, ms\xa01", "  by\xa0pallas,", "  ms\xa02"]


def test_text_has_the_whole_table_however_wide():
    grid = Grid("", ["name", *(f"column {i}" for i in range(30))], [["a", *("12345678" for _ in range(30))]])
    assert str(Value((grid,))).splitlines()[-1].split() == ["a", *["12345678"] * 30]


def test_html_is_escaped_and_has_tables():
    page = Page([Grid("<t>", ("a", "b"), [Row(("<x>", "1"), "bold")]), "1 < 2", warning("<w>"), Text("done", "bold")])
    assert page.html() == (
        "<table><caption>&lt;t&gt;</caption><tr><th>a</th><th>b</th></tr>"
        '<tr style="font-weight:bold"><td>&lt;x&gt;</td><td>1</td></tr></table>'
        "<p>1 &lt; 2</p><p><b>warning:</b> &lt;w&gt;</p><p><b>done</b></p>"
    )
