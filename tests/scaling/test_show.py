"""Tables of results as text: the same in a notebook, where rich would rather show them itself."""

import pytest

from cramjax.scaling.show import as_text


def test_text_is_the_same_in_a_notebook(monkeypatch: pytest.MonkeyPatch):
    table = ("Title", ["", "best"], [["loss", "2.5"]], ["take care"])
    plain = as_text(*table)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert as_text(*table) == plain
    assert "2.5" in plain and "warning: take care" in plain
