"""Tables: what is read, and what each mistake is told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cramjax.errors import ConfigError
from cramjax.scaling import Columns, read_runs

ROWS = {"params": [1e6, 2e6, 4e6], "tokens": [1e8, 2e8, 3e8], "loss": [4.0, 3.5, 3.25]}
CSV = "params,tokens,loss\n1e6,1e8,4.0\n2000000,2e8,3.5\n4e6,3e8,3.25\n"


def test_every_source_reads_the_same(tmp_path: Path):
    (tmp_path / "runs.csv").write_text("\ufeff" + CSV, encoding="utf-8")
    pq.write_table(pa.table(ROWS), tmp_path / "runs.parquet")
    for table in (
        ROWS,
        pa.table(ROWS),
        pa.table(ROWS).to_pandas(),
        tmp_path / "runs.csv",
        str(tmp_path / "runs.parquet"),
    ):
        runs = read_runs(table)
        for name, values in ROWS.items():
            np.testing.assert_array_equal(getattr(runs, name), values)
        np.testing.assert_array_equal(runs.flops, 6 * runs.params * runs.tokens)


def test_flops_are_a_column_or_6nd():
    with_flops = ROWS | {"flops": [1e15, 2e15, 3e15], "other": [1.0, 2.0, 3.0]}
    assert list(read_runs(with_flops).flops) == [1e15, 2e15, 3e15]
    assert list(read_runs(with_flops, Columns(flops="other")).flops) == [1, 2, 3]
    assert read_runs(with_flops, Columns(flops="6ND")).flops[0] == 6e14


def test_failed_runs_are_left_out(tmp_path: Path):
    (tmp_path / "runs.csv").write_text(CSV + "8e6,5e8,\n", encoding="utf-8")
    runs = read_runs(tmp_path / "runs.csv")
    assert len(runs) == 3 and runs.dropped == 1
    assert read_runs({name: [*values, None] for name, values in ROWS.items()}).dropped == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "params,tokens\n1,2\n",
            "has no column loss; it has params, tokens. A table of runs needs params, tokens and loss",
        ),
        (CSV + "0,1e8,3\n", "column params, row 4: '0' is not a positive finite number"),
        (CSV + "1e6,-1e8,3\n", "column tokens, row 4: '-1e8' is not a positive"),
        (CSV + "1e6,1e8,nan\n", "column loss, row 4: 'nan' is not a positive"),
        (CSV + "1e6,1e8,inf\n", "column loss, row 4: 'inf' is not a positive"),
        (CSV + "1e6,many,3\n", "column tokens, row 4: 'many' is not a positive"),
        (CSV + "1e6,1e8\n", "row 5: 2 cells, but 3 column names"),
        ("", "is empty"),
        ("params,tokens,loss\n", "has no row with params, tokens, loss"),
    ],
)
def test_mistakes_in_a_csv_file(content: str, message: str, tmp_path: Path):
    (tmp_path / "runs.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_runs(tmp_path / "runs.csv")


def test_files_that_are_no_table(tmp_path: Path):
    (tmp_path / "runs.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name, message in (
        ("runs.parquet", "is not a Parquet file"),
        ("runs.csv", "is not a CSV file in UTF-8"),
        ("none.csv", "cannot read .*none.csv: No such file"),
        ("none.parquet", "cannot read .*none.parquet"),
        (".", "cannot read .*: Is a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_runs(tmp_path / name)
    for table in (3, {}, {"params": [1, 2], "tokens": [1]}):
        with pytest.raises(ConfigError, match="is no table"):
            read_runs(table)
