"""Preparing examples: what of each format is predicted, packing, what is held out, the cache, and bad rows."""

import csv
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.config import TokenizerConfig
from cramjax.data import Prefetcher, Tokenizer, require_sequences
from cramjax.data.examples import ExampleFile, ExampleRows, ExamplesConfig, PreparedExamples, prepare_examples
from cramjax.data.examples.rows import first_fit, pack
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, DataError

# By name, because the package exports the function under the module's own.
module = importlib.import_module("cramjax.data.examples.prepare")

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), [])
SEPARATOR = BYTES.separator_id
LENGTH = 31


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "examples"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, longest: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": "?" * (n % 7), "completion": f"{n} " + "é" * (n * n % (longest // 2))} for n in range(count)]


def prepared(source: str, format: str = "completion", length: int = LENGTH, **options: Any) -> PreparedExamples:
    return prepare_examples(ExamplesConfig(source, format=format, **options), BYTES, None, length)  # pyright: ignore


def examples_of(file: ExampleFile) -> list[tuple[list[int], list[int]]]:
    """Ids and predictions of every example, as they lie in rows."""
    found = []
    for number in range(len(file)):
        ids, numbers, predicted = file.row(number)
        assert numbers.max() == len(file.members(number))
        for place in range(1, numbers.max() + 1):
            found.append((ids[numbers == place].tolist(), predicted[numbers == place].tolist()))
        assert (ids[numbers == 0] == 0).all() and (predicted[numbers == 0] == 0).all()
    return found


def of_pair(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    prompt, completion = row["prompt"].encode(), row["completion"].encode()
    ids = [SEPARATOR, *prompt, *completion, SEPARATOR]
    return ids, [0] * (1 + len(prompt)) + [1] * (len(completion) + 1)


def test_completions_and_their_ends_are_predicted(tmp_path: Path) -> None:
    rows = pairs(40)
    found = prepared(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2)
    every = examples_of(found.train) + examples_of(found.validation)
    assert sorted(every) == sorted(map(of_pair, rows))
    assert 2 <= len(examples_of(found.validation)) <= 15  # 8 expected, standard deviation 2.5
    counts = found.counts
    assert (counts.read, counts.cut, counts.dropped, counts.repeated) == (40, 0, 0, 0)
    for split, file in ((counts.train, found.train), (counts.validation, found.validation)):
        own = examples_of(file)
        assert (split.examples, split.rows) == (len(own), len(file))
        assert split.tokens == sum(len(ids) for ids, _ in own)
        assert split.predicted == sum(sum(flags) for _, flags in own)
        assert split.text_bytes == split.predicted - split.examples  # an end is no text
        assert file.bytes_per_token == split.text_bytes / split.predicted
    assert str(found).startswith("examples of at most 31 tokens: read 40; kept ")
    assert found.report["stages"]["train"]["examples"] == counts.train.examples


def test_texts_are_predicted_whole(tmp_path: Path) -> None:
    found = prepared(write(tmp_path / "a.jsonl", [{"body": "aé"}, {"body": "<sep>"}]), "text", fields={"text": "body"})
    every = examples_of(found.train) + examples_of(found.validation)
    expected = [[SEPARATOR, *text.encode(), SEPARATOR] for text in ("aé", "<sep>")]
    assert sorted(every) == sorted((ids, [0] + [1] * (len(ids) - 1)) for ids in expected)


def test_conversations(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "b"}]} for n in range(3)]
    found = prepared(write(tmp_path / "a.jsonl", rows), "chat")
    asked = [f"User:\n{n}\n\nAssistant:\n".encode() for n in range(3)]
    expected = [
        ([SEPARATOR, *text, ord("b"), SEPARATOR, 10, 10], [0] * (1 + len(text)) + [1, 1, 0, 0]) for text in asked
    ]
    assert sorted(examples_of(found.train) + examples_of(found.validation)) == sorted(expected)
    assert found.template is not None and "Assistant" in found.template
    own = "{% for m in messages %}{{ m.content }}<sep>{% endfor %}"
    other = prepare_examples(ExamplesConfig(str(tmp_path / "a.jsonl")), BYTES, own, LENGTH)
    assert other.template == own and other.path != found.path


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pairs(12)
    lines = "\n".join("\t".join(row.values()) for row in [{"a": "prompt", "b": "completion"}, *rows])
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.tsv").write_text(lines, encoding="utf-8")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = prepared(write(tmp_path / "a.jsonl", rows)).identity
    for name in ("a.json", "a.tsv", "a.csv", "a.parquet", "saved"):
        assert prepared(str(tmp_path / name)).identity == expected, name


def test_examples_longer_than_a_row(tmp_path: Path) -> None:
    # The last token of a row is only predicted, so a row takes one more than the model sees.
    rows = [{"prompt": "p" * asked, "completion": "c" * said} for asked, said in ((3, 2), (20, 10), (20, 11), (31, 1))]
    source = write(tmp_path / "a.jsonl", rows)
    held_out = write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    cut = prepared(source, validation=held_out)
    assert (cut.counts.read, cut.counts.cut, cut.counts.dropped) == (5, 1, 1)  # of the last nothing predicted is left
    expected = [of_pair(rows[0]), of_pair(rows[1]), tuple(part[:32] for part in of_pair(rows[2]))]
    assert sorted(examples_of(cut.train)) == sorted(expected)
    assert cut.counts.train.text_bytes == 2 + 10 + 11
    assert "cut 1 longer ones; dropped 1 longer ones; kept 3" in str(cut)
    dropped = prepared(source, validation=held_out, overlong="drop")
    assert (dropped.counts.cut, dropped.counts.dropped, dropped.counts.train.examples) == (0, 2, 2)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: 33 tokens, and the model sees 31\. Shorten it"):
        prepared(source, validation=held_out, overlong="error")


@given(st.lists(st.integers(1, 20), max_size=40))
@settings(max_examples=60, deadline=None)
def test_first_fit_is_its_definition(lengths: list[int]) -> None:
    room, expected = [], []
    for length in lengths:
        row = next((n for n, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(20)
        room[row] -= length
        expected.append(row)
    assert first_fit(lengths, 20).tolist() == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_packing_loses_nothing_and_cuts_nothing(lengths: list[int]) -> None:
    numbers = np.arange(len(lengths)) + 100
    order, rows = pack(numbers, np.asarray(lengths), 20)
    assert sorted(order) == numbers.tolist()
    sizes = [sum(lengths[n - 100] for n in order[a:b]) for a, b in zip(rows, rows[1:], strict=False)]
    assert max(sizes) <= 20 and min(sizes) > 0 and sum(sizes) == sum(lengths)
    assert len([size for size in sizes if size <= 10]) <= 1  # two half empty rows would have been one


class TestRows:
    @pytest.fixture
    def rows(self, tmp_path: Path) -> ExampleRows:
        return ExampleRows(prepared(write(tmp_path / "a.jsonl", pairs(60))).train, seed=3)

    def test_a_position_is_one_integer(self, rows: ExampleRows) -> None:
        whole = rows.take(5, 40)
        assert (whole.shape, whole.dtype) == ((40, 3, LENGTH + 1), np.int32)
        np.testing.assert_array_equal(np.concatenate([rows.take(5, 17), rows.take(22, 23)]), whole)
        with Prefetcher(rows, start=9, microbatch=4) as batches:
            for step in range(5):
                np.testing.assert_array_equal(next(batches), rows.take(9 + 4 * step, 4))

    def test_an_epoch_is_every_row_once_in_an_order_of_its_own(self, rows: ExampleRows) -> None:
        count = len(rows)
        first, second = rows.take(0, count), rows.take(count, count)
        every = sorted(rows.file.row(number).tolist() for number in range(count))
        assert sorted(first.tolist()) == sorted(second.tolist()) == every
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, ExampleRows(rows.file, seed=4).take(0, count))

    def test_too_few_for_a_batch(self, rows: ExampleRows) -> None:
        require_sequences(rows, len(rows))
        with pytest.raises(DataError, match=rf"makes {len(rows)} sequences of 31 tokens \({rows.tokens} tokens\)"):
            require_sequences(rows, len(rows) + 1)


class TestHeldOut:
    def test_a_file(self, tmp_path: Path) -> None:
        rows = pairs(20)
        source, held_out = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[3:6])
        found = prepared(source, validation=held_out)
        assert sorted(examples_of(found.validation)) == sorted(map(of_pair, rows[3:6]))
        assert sorted(examples_of(found.train)) == sorted(map(of_pair, rows[:3] + rows[6:]))
        assert found.counts.repeated == 3
        assert "dropped 3 that are held out too" in str(found)

    def test_depends_on_the_example_alone(self, tmp_path: Path) -> None:
        rows = pairs(80)
        one = prepared(write(tmp_path / "a.jsonl", rows[:60]), validation_fraction=0.3)
        two = prepared(write(tmp_path / "b.jsonl", rows[:19:-1]), validation_fraction=0.3)
        both = sorted(map(of_pair, rows[20:60]))
        first, second = ([e for e in examples_of(part.validation) if e in both] for part in (one, two))
        assert sorted(first) == sorted(second) != []

    @pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
    def test_neither_side_is_empty(self, tmp_path: Path, share: float) -> None:
        found = prepared(write(tmp_path / "a.jsonl", pairs(3)), validation_fraction=share)
        assert {found.counts.train.examples, found.counts.validation.examples} == {1, 2}


class TestCache:
    def test_prepares_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write(tmp_path / "a.jsonl", pairs(30))
        first = prepared(source)
        monkeypatch.setattr(module, "_prepare_into", None)  # Whoever prepares now fails.
        second = prepared(source)
        assert (second.path, second.identity, second.counts) == (first.path, first.identity, first.counts)
        assert examples_of(second.train) == examples_of(first.train)

    def test_everything_that_shapes_rows_has_its_own_entry(self, tmp_path: Path) -> None:
        source = write(tmp_path / "a.jsonl", [{**row, "text": "t", "other": "o"} for row in pairs(30)])
        wanted = [
            {},
            {"length": 40},
            {"overlong": "drop"},
            {"validation_fraction": 0.5},
            {"validation": write(tmp_path / "b.jsonl", pairs(2))},
            {"fields": {"completion": "other"}},
            {"format": "text"},
        ]
        found = [prepared(source, **options).path for options in wanted]
        wordpiece = make_tokenizer(TokenizerConfig(vocab_size=300), ["some text"])
        found.append(prepare_examples(ExamplesConfig(source, format="completion"), wordpiece, None, LENGTH).path)
        write(tmp_path / "a.jsonl", pairs(31))
        found.append(prepared(source).path)
        assert len(set(found)) == len(wanted) + 2

    def test_another_corpus_has_another_identity(self, tmp_path: Path) -> None:
        rows = pairs(30)
        changed = [*rows[:-1], {**rows[-1], "completion": rows[-1]["completion"][:-1] + "è"}]
        held_out = write(tmp_path / "v.jsonl", [{"prompt": "", "completion": "v"}])
        first = prepared(write(tmp_path / "a.jsonl", rows), validation=held_out)
        second = prepared(write(tmp_path / "b.jsonl", changed), validation=held_out)
        assert first.counts == second.counts and first.identity != second.identity
        assert first.identity == first.train.identity

    @pytest.mark.parametrize("damage", ["tokens", "predicted", "index.npz", "examples.json"])
    def test_damaged_files_are_prepared_again(self, tmp_path: Path, damage: str) -> None:
        source = write(tmp_path / "a.jsonl", pairs(30))
        first = prepared(source)
        expected = examples_of(first.train)
        (first.path / damage).write_bytes((first.path / damage).read_bytes()[:-8])
        assert examples_of(prepared(source).train) == expected

    def test_an_interrupted_preparation_leaves_nothing(
        self, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write(tmp_path / "a.jsonl", pairs(30))
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_description", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepared(source)
        assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]

    def test_progress_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
        said: list[str] = []
        config = ExamplesConfig(write(tmp_path / "a.jsonl", pairs(3)), format="completion")
        prepare_examples(config, BYTES, None, LENGTH, progress=said.append)
        assert said == ["preparing examples: 1", "preparing examples: 2", "preparing examples: 3"]


class TestErrors:
    """One message each, with the file and the row."""

    @pytest.mark.parametrize(
        ("format", "lines", "message"),
        [
            ("completion", '{"prompt": "a"}', r"a\.jsonl, line 2: no field 'completion'. It has prompt: name the one"),
            ("completion", '{"prompt": "a", "completion": null}', "line 2: field 'completion' is empty. Fill it in"),
            (
                "completion",
                '{"prompt": "a", "completion": ""}',
                "line 2: field 'completion' is empty, so there",
            ),
            (
                "completion",
                '{"prompt": 3, "completion": "a"}',
                "line 2: field 'prompt' holds a number, and must",
            ),
            (
                "chat",
                '{"prompt": "a", "completion": "b"}',
                r"line 2: its fields \(prompt, completion\) are those of examples.format=completion, and .* is chat\.",
            ),
            ("text", '{"conversations": []}', "are those of examples.format=chat, and examples.format is text"),
            ("text", '{"text": " \\n"}', "line 2: field 'text' is empty, so there is nothing to predict"),
            ("text", '{"text": ["a"]}', "line 2: field 'text' holds a list, and must be a text"),
            ("text", '"a"', "line 2: got a text, and each row must be an object of named values"),
            ("text", '{"text": ', r"line 2: not JSON \(.*\)\. Give one object a line"),
            ("chat", '{"messages": [{"role": "user", "content": "a"}]}', "line 2: no turn of the assistant"),
        ],
    )
    def test_rows(self, tmp_path: Path, format: str, lines: str, message: str) -> None:
        (tmp_path / "a.jsonl").write_text(f"\n{lines}\n", encoding="utf-8")
        with pytest.raises(DataError, match=message):
            prepared(str(tmp_path / "a.jsonl"), format)

    def test_tables(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('text,more\n"a\nb",c\nd\n', encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.csv, line 4: it must have 2 values, as the first line names columns"):
            prepared(str(tmp_path / "a.csv"), "text")
        (tmp_path / "b.csv").write_text('text\n"a\n', encoding="utf-8")
        with pytest.raises(DataError, match=r"b\.csv: cannot be read \(unexpected end of data\)"):
            prepared(str(tmp_path / "b.csv"), "text")

    def test_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.txt: not a file of rows. Give \.jsonl, \.json, \.csv"):
            prepared(str(tmp_path / "a.txt"), "text")

    def test_too_few(self, tmp_path: Path) -> None:
        one = write(tmp_path / "a.jsonl", pairs(1))
        with pytest.raises(DataError, match=r"leaves 1 example\(s\), too few to hold one out: of 1 read, 0"):
            prepared(one)
        with pytest.raises(
            DataError, match=r"no example is left of examples.source .*: of 2 read, .* and 1 as held out"
        ):
            prepared(one, validation=one)
        empty = write(tmp_path / "b.jsonl", [])
        with pytest.raises(DataError, match="no example is left of examples.validation"):
            prepared(one, validation=empty)

    def test_configuration(self, tmp_path: Path) -> None:
        source = write(tmp_path / "a.jsonl", pairs(5))
        with pytest.raises(
            ConfigError, match="examples.fields names 'answer', and completion examples have prompt, comp"
        ):
            prepared(source, fields={"answer": "completion"})
        with pytest.raises(ConfigError, match="examples.validation_fraction must be between 0 and 1, got 2"):
            prepared(source, validation_fraction=2.0)


def test_halves_of_surrogate_pairs_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800"}\n{"text": "b"}\n', encoding="utf-8")
    found = prepared(str(tmp_path / "a.jsonl"), "text")
    every = sorted(examples_of(found.train) + examples_of(found.validation))
    assert [ids for ids, _ in every] == [[SEPARATOR, *b"a?", SEPARATOR], [SEPARATOR, *b"b", SEPARATOR]]


def test_models_without_a_begin_token_get_none_before_a_prompt(tmp_path: Path) -> None:
    bare: Tokenizer = dataclasses.replace(BYTES, begin_ids=())
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    found = prepare_examples(ExamplesConfig(source, format="completion"), bare, None, LENGTH)
    every = sorted(examples_of(found.train) + examples_of(found.validation))
    assert every == [([97, 98, SEPARATOR], [0, 1, 1]), ([SEPARATOR, 98, SEPARATOR], [0, 1, 1])]
