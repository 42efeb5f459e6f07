"""Tables of runs: from CSV, Parquet or memory to checked arrays, with every mistake named by its column and row."""

import csv
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.errors import ConfigError
from cramjax.scaling.fit.law import Array

Table = str | Path | Mapping[str, Any] | Any
"""A CSV or Parquet file, a mapping of columns, a pyarrow table or a pandas data frame."""

SIX_ND = "6ND"
"""In place of a column: 6 FLOPs for each parameter and token."""
_BITS = "bits_per_byte"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read.

    Attributes:
        params: parameters; which ones are counted (with or without embeddings, say) is the column's choice.
        tokens: tokens trained on.
        loss: the loss, in nats per token or in bits per byte.
        flops: training FLOPs, or `6ND`; None: the column `flops` if there is one, else 6·params·tokens.
        run: names the training curve of a row, for the envelope; None: a column `run` if there is one, else `params`.
    """

    params: str = "params"
    tokens: str = "tokens"
    loss: str = "loss"
    flops: str | None = None
    run: str | None = None


@dataclass(frozen=True)
class Runs:
    """A table of runs.

    Attributes:
        params: parameters of each row.
        tokens: tokens each row was trained on.
        flops: training FLOPs of each row.
        loss: the loss each row reached.
        curve: which training curve each row is of.
        columns: where these came from; `flops` says a column or `6ND`.
        dropped: rows left out because a value was missing.
        bits: bits per byte of each row, if the table has a column `bits_per_byte` beside its loss.
    """

    params: Array
    tokens: Array
    flops: Array
    loss: Array
    curve: tuple[Hashable, ...]
    columns: Columns
    dropped: int = 0
    bits: Array | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def bits_per_byte_of(self) -> float | None:
        """Bits per byte for each unit of loss: tokens per byte over ln 2, of the rows' median; None: not known."""
        if self.columns.loss == _BITS:
            return 1.0
        return None if self.bits is None else float(np.median(self.bits / self.loss))

    def json(self) -> dict[str, list[Any]]:
        """The rows under the table's own column names, to be read again."""
        columns = self.columns
        out = {columns.params: self.params, columns.tokens: self.tokens, columns.loss: self.loss}
        if columns.flops not in (None, SIX_ND):
            out[columns.flops] = self.flops
        if self.bits is not None:
            out[_BITS] = self.bits
        found = {name: values.tolist() for name, values in out.items()}
        if columns.run is not None and columns.run not in found:
            found[columns.run] = [x if isinstance(x, str | int | float) else str(x) for x in self.curve]
        return found


def read_runs(table: Table, columns: Columns | None = None) -> Runs:
    """Read and check a table of runs.

    Rows with an empty cell (a run that failed) are left out and counted.

    Args:
        table: a file, or columns in memory.
        columns: their names.

    Raises:
        ConfigError: unreadable file, missing column, a value that is not a positive finite number, or no rows.
    """
    columns = columns or Columns()
    found = read_columns(table)
    flops = columns.flops or ("flops" if "flops" in found else SIX_ND)
    names = [columns.params, columns.tokens, columns.loss, *([] if flops == SIX_ND else [flops])]
    _demand(found, names, table)
    curve = columns.run or ("run" if "run" in found else columns.params)
    _demand(found, [curve], table)
    keep = [i for i in range(len(found[names[0]])) if not any(_missing(found[name][i]) for name in names)]
    if not keep:
        raise ConfigError(f"{_name(table)} has no row with {', '.join(names)}: give a table with one row for each run.")
    values = {name: _positive(found[name], name, keep) for name in names}
    params, tokens, loss = (values[name] for name in names[:3])
    return Runs(
        params,
        tokens,
        6.0 * params * tokens if flops == SIX_ND else values[flops],
        loss,
        tuple(found[curve][i] for i in keep),
        Columns(columns.params, columns.tokens, columns.loss, flops, curve),
        len(found[names[0]]) - len(keep),
        _bits(found, keep) if columns.loss != _BITS else None,
    )


def read_columns(table: Table) -> dict[str, list[Any]]:
    """The columns of a table, cells as they are.

    Raises:
        ConfigError: the file cannot be read, or is no table.
    """
    if isinstance(table, str | Path):
        path = Path(table)
        try:
            return _read_parquet(path) if path.suffix in (".parquet", ".pq") else _read_csv(path)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise ConfigError(f"cannot read {path}: {reason}. Give a CSV or Parquet file.") from None
    if to_pydict := getattr(table, "to_pydict", None):  # a pyarrow table
        return to_pydict()
    names = getattr(table, "columns", None)
    columns = table if isinstance(table, Mapping) else {} if names is None else {str(n): table[n] for n in names}
    found = {str(name): list(values) for name, values in columns.items()}
    if not found or len({len(values) for values in found.values()}) != 1:
        raise ConfigError(f"{_name(table)} is no table: give columns of one length, by name, or a CSV or Parquet file.")
    return found


def positive_column(found: Mapping[str, Sequence[Any]], name: str, keep: Sequence[int], table: Table) -> Array:
    """One column of positive numbers.

    Args:
        found: the table's columns.
        name: of the column.
        keep: the rows to take.
        table: for messages.

    Raises:
        ConfigError: there is no such column, or a value is not a positive finite number.
    """
    _demand(found, [name], table)
    return _positive(found[name], name, keep)


def complete_rows(found: Mapping[str, Sequence[Any]], names: Sequence[str], table: Table) -> list[int]:
    """The rows with a value in each of some columns.

    Raises:
        ConfigError: there is no such column.
    """
    _demand(found, names, table)
    return [i for i in range(len(found[names[0]])) if not any(_missing(found[name][i]) for name in names)]


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error):
        raise ConfigError(f"{path} is not a CSV file in UTF-8: give a CSV or Parquet (.parquet) file.") from None
    if not rows:
        raise ConfigError(f"{path} is empty: give a CSV file with a line of column names and a row for each run.")
    header = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ConfigError(f"{path}, row {number}: {len(row)} cells, but {len(header)} column names. Mend that row.")
    return {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(header)}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pydict()
    except pa.ArrowInvalid:
        raise ConfigError(f"{path} is not a Parquet file: give a CSV or Parquet file.") from None


def _bits(found: Mapping[str, Sequence[Any]], keep: Sequence[int]) -> Array | None:
    """The column of bits per byte, if each row kept has one."""
    cells = found.get(_BITS)
    if cells is None or any(_missing(cells[i]) for i in keep):
        return None
    return _positive(cells, _BITS, keep)


def _demand(found: Mapping[str, Any], names: Sequence[str], table: Table) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"{_name(table)} has no column {', '.join(missing)}; it has {', '.join(found)}. A table of runs needs "
            "params, tokens and loss; other names are given with --params, --tokens, --loss and --flops."
        )


def _missing(cell: Any) -> bool:
    return cell is None or cell == ""


def _positive(cells: Sequence[Any], name: str, keep: Sequence[int]) -> Array:
    out = np.empty(len(keep))
    for place, i in enumerate(keep):
        try:
            out[place] = float(cells[i])
        except (TypeError, ValueError):
            out[place] = math.nan
        if not (math.isfinite(out[place]) and out[place] > 0):
            raise ConfigError(
                f"column {name}, row {i + 1}: {cells[i]!r} is not a positive finite number. "
                "Leave that row out, or its cell empty if the run failed."
            )
    return out


def _name(table: Table) -> str:
    return str(table) if isinstance(table, str | Path) else "the table"
