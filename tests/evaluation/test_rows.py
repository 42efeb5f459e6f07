"""Rows of every kind of file, what is made of their fields, and what is said of those that cannot be used."""

import csv
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cramjax.data.records import Record
from cramjax.errors import DataError
from cramjax.evaluation.made import MADE, agreement, summaries, sums
from cramjax.evaluation.rows import fill, fill_list, read_rows

from .helpers import write_rows

ROWS = [{"text": "one, 1", "label": "a"}, {"text": 'two\n"2"', "label": "b"}, {"text": "drei ß", "label": "a"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(tmp_path / "several"))
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "one", "several"):
        rows = list(read_rows(tmp_path / name))
        assert [dict(row.values) for row in rows] == ROWS, name
        assert rows[0].where.startswith(str(tmp_path / name))
    assert len(list(read_rows(tmp_path / "several", "train"))) == 1
    # Places are those that an editor shows: the second row of CSV has a line end in it.
    assert [row.where.rpartition(" ")[2] for row in read_rows(tmp_path / "rows.csv")] == ["2", "4", "5"]
    assert [row.where.rpartition(" ")[2] for row in read_rows(tmp_path / "rows.parquet")] == ["1", "2", "3"]


FIELDS = {"a": "x", "n": 3, "yes": True, "list": ["p", 2], "deep": {"text": ["q", "r"]}, "gone": None}
ROW = Record(FIELDS, "f, line 3")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}-{n}", "x-3"),
        ("{{{a}}} {{}}", "{x} {}"),
        ("{yes}", "true"),
        ("{list.1}{deep.text.0}", "2q"),
        ("no field", "no field"),
    ],
)
def test_templates(template: str, expected: str):
    assert fill(template, ROW) == expected


def test_lists_of_texts():
    assert fill_list("{list}", ROW) == ["p", "2"]
    assert fill_list("{deep.text}", ROW) == ["q", "r"]
    assert fill_list(("{a}", "b"), ROW) == ["x", "b"]
    assert fill_list("{a}", ROW) == ["x"] and fill_list("{a} {n}", ROW) == ["x 3"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{b}", "f, line 3: there is no field 'b'. Its fields: a, n, yes, list, deep, gone."),
        ("{list.2}", "there is no field 'list.2'"),
        ("{a.x}", "there is no field 'a.x'"),
        ("{gone}", "f, line 3: {gone} must be a text or a number, got null."),
        ("{list}", '{list} must be a text or a number, got ["p", 2].'),
    ],
)
def test_templates_that_a_row_does_not_fit(template: str, message: str):
    with pytest.raises(DataError) as error:
        fill(template, ROW)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": 1\n', "a.jsonl, line 2: not JSON"),
        ("a.csv", b"a,b\n1,2\n1\n", "a.csv, line 3: it must have 2 values"),
        ("a.csv", b"a,a\n1,2\n", "a.csv, line 1: two columns are called 'a'. Rename one"),
        ("a.txt", b"x", "not a file of rows. Give .jsonl"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_rows(file))
    assert message in str(error.value)


def test_places_that_hold_no_rows(tmp_path: Path):
    with pytest.raises(DataError, match="no such file or directory"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="not one saved by datasets"):
        list(read_rows(tmp_path))
    data = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    data.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no split 'test'. Set hub_split \(in a task: split\) to one of: train."):
        list(read_rows(tmp_path / "saved"))
    with pytest.raises(DataError, match="there is no data set made:agrement; did you mean agreement"):
        list(read_rows("made:agrement"))


def test_what_is_made_is_the_same_every_time():
    for name, make in MADE.items():
        rows = list(make())
        assert rows and rows == list(make()), name


def test_sentences_agree_and_are_balanced():
    """By the rule of English that was not used to make them: the verb after a plural subject has no s."""
    rows = list(agreement())
    assert len({row["good"] for row in rows}) == len(rows) == 960
    plurals = 0
    for row in rows:
        words, others = row["good"].rstrip(".").split(), row["bad"].rstrip(".").split()
        assert words != others and len(words) == len(others)
        changed = [place for place in range(len(words)) if words[place] != others[place]]
        assert len(changed) == 1  # the verb alone differs
        plural = words[1].endswith("s") or words[1] in ("children", "women")
        verb = words[changed[0]]
        assert (verb in ("are", "have", "were") or not verb.endswith("s")) == plural, row
        if row["construction"] == "clause":
            inner_plural = words[4].endswith("s") or words[4] in ("children", "women")
            assert inner_plural != plural and words[5].endswith("s") != inner_plural
        plurals += plural
    assert 0.45 < plurals / len(rows) < 0.55


def test_sums_add_up():
    rows = list(sums())
    assert len({(row["a"], row["b"]) for row in rows}) == len(rows) == 400
    assert all(row["a"] + row["b"] == row["sum"] for row in rows)


def test_summaries_are_those_of_python():
    import fnmatch
    import inspect
    import shlex

    rows: dict[str, Any] = {row["function"].partition("(")[0]: row for row in summaries()}
    for function in (fnmatch.filter, shlex.quote):
        row = rows[f"def {function.__name__}"]
        assert row["choices"][row["gold"]] == (inspect.getdoc(function) or "").splitlines()[0]
        assert len(set(row["choices"])) == 4
