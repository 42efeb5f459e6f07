"""Labelled texts: framed as the tokenizer has it, with the right label, and bad rows named."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from cramjax.config import TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.examples import (
    ExampleRows,
    LabelledFile,
    LabelsConfig,
    PreparedLabels,
    labelled_rows,
    prepare_labels,
)
from cramjax.data.examples.frames import cut_longest, frame_of
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError, DataError
from cramjax.model.objectives import labelled

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), [])
SEPARATOR = BYTES.separator_id
LENGTH = 15
WORDS = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "b", "c"])}


def word_tokenizer(processor: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="c"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processor
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    return Tokenizer(backend, 2, None, 0, (1,))


BERT = word_tokenizer(processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)))
ROBERTA = word_tokenizer(processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)))
LLAMA = word_tokenizer(
    processors.TemplateProcessing("[CLS] $A", pair="[CLS] $A [CLS] $B:1", special_tokens=[("[CLS]", 1)])
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def prepared(source: str, tokenizer: Tokenizer = BYTES, length: int = LENGTH, **options: Any) -> PreparedLabels:
    return prepare_labels(LabelsConfig(source, **options), tokenizer, length)


def examples_of(*files: LabelledFile) -> list[tuple[list[int], list[int], float]]:
    every = [file.example(number) for file in files for number in range(len(file))]
    return sorted((e.ids.tolist(), e.token_types.tolist(), e.label) for e in every)


@pytest.mark.parametrize("name", ["BERT", "ROBERTA"])
@pytest.mark.parametrize("pairs", [False, True])
def test_frames_are_those_of_the_tokenizers_template(name: str, pairs: bool) -> None:
    tokenizer: Tokenizer = globals()[name]
    frame = frame_of(tokenizer, pairs=pairs)
    for first, second in (("b", "a c"), ("a b c", "a"), ("c b", "c c c")):
        expected = tokenizer.backend.encode(first, second if pairs else None)
        ids, types = frame.around(tokenizer.encode(first), tokenizer.encode(second) if pairs else ())
        assert (ids.tolist(), types.tolist()) == (expected.ids, expected.type_ids)


def test_frames_of_tokenizers_that_lack_them() -> None:
    # Ours have a separator before, between and after; Llama's get one after the last text.
    ids, types = frame_of(BYTES, pairs=True).around([1, 2], [3])
    assert (ids.tolist(), types.tolist()) == ([SEPARATOR, 1, 2, SEPARATOR, 3, SEPARATOR], [0, 0, 0, 0, 1, 1])
    assert frame_of(BYTES, pairs=False).around([1])[0].tolist() == [SEPARATOR, 1, SEPARATOR]
    assert frame_of(LLAMA, pairs=False).around([4])[0].tolist() == [1, 4, 2]
    assert frame_of(LLAMA, pairs=True).around([4], [5, 3])[0].tolist() == [1, 4, 1, 5, 3, 2]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_the_longer_text_is_cut_first(first: int, second: int, room: int) -> None:
    kept = [first, second]
    while sum(kept) > room:
        kept[0 if kept[0] > kept[1] else 1] -= 1
    assert cut_longest(first, second, room) == tuple(kept)


def test_classes_are_numbered_in_order(tmp_path: Path) -> None:
    rows = [{"text": letter, "label": name} for letter, name in zip("abcdef", ["no", "yes", "no", "may"] * 2)]  # noqa: B905
    held_out = write(tmp_path / "v.jsonl", [{"text": "z", "label": "yes"}])
    found = prepared(write(tmp_path / "a.jsonl", rows), validation=held_out)
    assert found.labels == ("may", "no", "yes")
    numbers = {"may": 0, "no": 1, "yes": 2}
    expected = [([SEPARATOR, ord(row["text"]), SEPARATOR], [0, 0, 0], numbers[row["label"]]) for row in rows]
    assert examples_of(found.train) == sorted(expected)
    assert examples_of(found.validation) == [([SEPARATOR, ord("z"), SEPARATOR], [0, 0, 0], 2)]
    assert found.counts.classes == {"may": 1, "no": 3, "yes": 2}
    assert str(found).endswith("kept 6 to train on (may 17%, no 50%, yes 33%) and 1 held out.")
    given_order = prepared(write(tmp_path / "a.jsonl", rows), validation=held_out, names=("yes", "no", "may"))
    assert [label for _, _, label in examples_of(given_order.train)] == [1, 0, 1, 2, 1, 0]


def test_classes_may_be_integers(tmp_path: Path) -> None:
    rows = [{"text": chr(97 + n), "label": n} for n in (10, 9, 2, 10)]
    held_out = write(tmp_path / "v.jsonl", [{"text": "z", "label": 9}])
    found = prepared(write(tmp_path / "a.jsonl", rows), validation=held_out)
    assert found.labels == ("2", "9", "10")
    named = write(tmp_path / "b.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    of_set = prepared(named, names=("negative", "positive"))
    assert sorted(e[0][1:2] + [e[2]] for e in examples_of(of_set.train, of_set.validation)) == [[120, 1], [121, 0]]


def test_pairs_numbers_and_rows(tmp_path: Path) -> None:
    rows = [{"premise": "a b", "hypothesis": "c", "score": 2.5 - n} for n in range(4)]
    rows += [{"premise": "a", "hypothesis": "b a", "score": "-1e-3"}]
    source = write(tmp_path / "a.jsonl", rows)
    fields = {"text": "premise", "pair": "hypothesis", "label": "score"}
    options: dict[str, Any] = {"fields": fields, "target": "number", "pairs": True, "length": 8}
    found = prepared(source, BERT, **options)
    every = examples_of(found.train, found.validation)
    assert every[0] == ([1, 3, 2, 4, 3, 2], [0, 0, 0, 1, 1, 1], -1e-3)
    assert [label for _, _, label in every[1:]] == [-0.5, 0.5, 1.5, 2.5]
    assert (found.labels, found.train.classes) == ((), 0)
    dealt = ExampleRows(found.train, seed=1)
    batch = labelled(jnp.asarray(dealt.take(0, len(dealt))), classes=False)
    assert batch.tokens.shape == batch.token_types.shape == batch.kv_mask.shape == (len(dealt), 8)
    again = sorted(
        (ids[there].tolist(), types[there].tolist(), float(label))
        for ids, types, there, label in zip(*map(np.asarray, batch), strict=True)
    )
    wanted = [(ids, types, float(np.float32(label))) for ids, types, label in examples_of(found.train)]
    assert again == wanted
    assert (np.asarray(batch.tokens)[~np.asarray(batch.kv_mask)] == BERT.pad_id).all()


def test_rows_of_classes(tmp_path: Path) -> None:
    rows = [{"text": letter, "label": f"class {letter}"} for letter in "abcd"]
    labels = tuple(row["label"] for row in rows)
    held_out = write(tmp_path / "v.jsonl", rows[:2])
    found = prepared(write(tmp_path / "a.jsonl", rows), validation=held_out, names=labels)
    assert (found.counts.repeated, len(found.train), found.labels) == (2, 2, labels)
    batch = labelled(jnp.asarray(np.stack([found.train.row(number) for number in range(2)])), classes=True)
    assert sorted(batch.labels.tolist()) == [2, 3] and batch.labels.dtype == jnp.int32


def test_texts_longer_than_the_model_sees(tmp_path: Path) -> None:
    rows = [{"text": "a" * 12, "pair": "b", "label": 0}, {"text": "a" * 12, "pair": "b" * 9, "label": 1}]
    held_out = write(tmp_path / "v.jsonl", [{"text": "v", "pair": "v", "label": 1}])
    source = write(tmp_path / "a.jsonl", rows)
    cut = prepared(source, pairs=True, validation=held_out)
    ids = [bytes(i for i in ids if i != SEPARATOR) for ids, _, _ in examples_of(cut.train)]
    assert ids == [b"a" * 11 + b"b", b"a" * 6 + b"b" * 6]
    assert cut.counts.cut == 2 and "cut 2 longer ones" in str(cut)
    with pytest.raises(DataError, match="no labelled example is left to train on of .*: of 3 read, 2 were dropped"):
        prepared(source, pairs=True, validation=held_out, overlong="drop")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: 16 tokens, and the model sees 15"):
        prepared(source, pairs=True, validation=held_out, overlong="error")
    with pytest.raises(ConfigError, match="a sequence of 4 tokens leaves no room beside 3 special ones"):
        prepared(source, pairs=True, length=4)


def test_prepares_once_and_again_where_damaged(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(30)])
    first = prepared(source)
    before = (first.path / "labels.json").stat().st_mtime_ns
    second = prepared(source)
    assert (second.identity, second.counts) == (first.identity, first.counts)
    assert (first.path / "labels.json").stat().st_mtime_ns == before
    (first.path / "examples.npz").write_bytes(b"no archive")
    assert examples_of(prepared(source).train) == examples_of(first.train)
    assert prepared(source, length=9).path != first.path
    assert first.report["stages"]["train"] == len(first.train)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "a", "label": "maybe"}, {"names": ("no", "yes")}, "line 2: label 'maybe' is not one of no, yes"),
        ({"text": "a", "label": 2}, {"names": ("no", "yes")}, "line 2: label 2 is not one of no, yes"),
        ({"text": "a", "label": -1}, {"names": ("no", "yes")}, "line 2: label -1 is not one of no, yes"),
        ({"text": "a", "label": 0.5}, {}, "line 2: label 0.5 is no name or integer of a class"),
        ({"text": "a", "label": ""}, {}, "line 2: label '' is no name or integer of a class"),
        ({"text": "a", "label": "x"}, {"target": "number"}, "line 2: label 'x' is no finite number"),
        ({"text": "a", "label": "nan"}, {"target": "number"}, "line 2: label 'nan' is no finite number"),
        (
            {"text": "a", "label": 10**400},
            {"target": "number"},
            r"line 2: label 10+\.\.\.0+ is no finite number of float32",
        ),
        ({"text": "a", "label": 1e300}, {"target": "number"}, r"line 2: label 1e\+300 is no finite number of float32"),
        ({"text": "a"}, {}, "line 2: no field 'label'. It has text"),
        ({"text": "a", "label": None}, {}, "line 2: field 'label' is empty"),
        ({"text": " ", "label": "no"}, {}, "line 2: field 'text' is empty, so there is nothing to judge"),
        ({"text": "a", "label": "no"}, {"pairs": True}, "line 1: no field 'pair'"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    known = 1 if options.get("target") == "number" else "no"
    rows = [{"text": "b", "label": known}, row, {"text": "c", "label": 2 if known == 1 else "yes"}]
    with pytest.raises(DataError, match=message):
        prepared(write(tmp_path / "a.jsonl", rows), **options)


def test_labels_that_training_does_not_know(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    held_out = write(tmp_path / "v.jsonl", [{"text": "c", "label": "z"}])
    with pytest.raises(DataError, match=r"v\.jsonl, line 1: label 'z' is not one of x, y\. Correct it"):
        prepared(source, validation=held_out)
    one = write(tmp_path / "b.jsonl", [{"text": t, "label": "x"} for t in "abc"])
    with pytest.raises(DataError, match="has one label, 'x', and classes are at least two"):
        prepared(one)
    with pytest.raises(ConfigError, match="labels.fields names 'answer', and labels examples have text, pair, label"):
        prepared(one, fields={"answer": "label"})


@pytest.mark.parametrize(
    ("extra", "options", "pairs"),
    [
        ({}, {}, False),
        ({"pair": "c"}, {}, True),
        ({"pair": "c"}, {"pairs": False}, False),
        ({"other": "c"}, {}, False),
        ({"other": "c"}, {"fields": {"pair": "other"}}, True),
    ],
)
def test_rows_are_pairs_where_they_have_one(
    tmp_path: Path, extra: dict[str, str], options: dict[str, Any], pairs: bool
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a" + "b" * n, "label": n % 2} | extra for n in range(6)])
    found = prepared(source, **options)
    separators = {ids.count(SEPARATOR) for ids, _, _ in examples_of(found.train, found.validation)}
    assert separators == {3 if pairs else 2}
    scored = labelled_rows(LabelsConfig(source, names=("0", "1"), **options), BYTES, LENGTH)
    assert {ids.count(SEPARATOR) for ids, _, _ in examples_of(scored)} == separators


def test_a_pair_that_is_named_is_not_ignored(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a", "other": "c", "label": n} for n in range(2)])
    with pytest.raises(ConfigError, match="fields names a pair, 'other', and labels.pairs is false"):
        prepared(source, pairs=False, fields={"pair": "other"})
