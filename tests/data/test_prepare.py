"""Preparing a corpus: what is in the token files, what is held out, and that the cache can be trusted."""

import dataclasses
import gzip
import importlib
import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from cramjax.config import DataConfig, TokenizerConfig
from cramjax.data.prepare import prepare
from cramjax.data.store import PreparedData, TokenFile
from cramjax.errors import ConfigError, DataError

# By name, because the package exports the function under the module's own.
module = importlib.import_module("cramjax.data.prepare")

BYTES = TokenizerConfig(kind="bytes")
SMALL_BPE = TokenizerConfig(vocab_size=300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def write_documents(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def prose(documents: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = "whale ship sea captain harpoon the a of and — naïve".split()
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) + f". {seed}.{n}" for n in range(documents)]


def documents_of(file: TokenFile, prepared: PreparedData) -> list[str]:
    """Texts between separators, read from the stream itself."""
    tokenizer, tokens = prepared.tokenizer, np.asarray(file.tokens)
    places = np.flatnonzero(tokens == tokenizer.separator_id)
    assert places[0] == 0 and places[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in zip(places, places[1:], strict=False)]


@pytest.mark.parametrize("tokenizer", [BYTES, SMALL_BPE], ids=["bytes", "bpe"])
def test_token_files_hold_every_document_in_order(tmp_path: Path, tokenizer: TokenizerConfig):
    texts = prose(200)
    prepared = prepare(DataConfig(write_documents(tmp_path / "a.jsonl", texts), validation_fraction=0.2), tokenizer)
    train, held_out = documents_of(prepared.train, prepared), documents_of(prepared.validation, prepared)
    assert train == [text for text in texts if text not in set(held_out)]
    assert held_out == [text for text in texts if text not in set(train)]
    assert 20 <= len(held_out) <= 60  # 40 expected, standard deviation 6
    assert prepared.train.text_bytes == sum(len(text.encode()) for text in train)
    assert prepared.validation_text.read_text(encoding="utf-8") == "".join(held_out)
    assert prepared.validation.text_bytes == prepared.validation_text.stat().st_size
    assert (prepared.train.documents, prepared.validation.documents) == (len(train), len(held_out))
    assert prepared.train.bytes_per_token == prepared.train.text_bytes / len(prepared.train.tokens)


def test_who_is_held_out_depends_on_the_document_alone(tmp_path: Path):
    texts = prose(200)
    other = [*prose(50, seed=1), *reversed(texts)]
    one = prepare(DataConfig(write_documents(tmp_path / "a.jsonl", texts), validation_fraction=0.2), BYTES)
    two = prepare(DataConfig(write_documents(tmp_path / "b.jsonl", other), validation_fraction=0.2), BYTES)
    assert set(documents_of(one.validation, one)) == set(documents_of(two.validation, two)) & set(texts)


def test_given_validation_text_is_kept_whole_exact_and_in_order(tmp_path: Path):
    line = "The same line, again and again — é.\n"
    whole = line * 5000 + "zq9!" * 10  # 190 kB, repeated, and ending in what no tokenizer compresses
    (tmp_path / "val.txt.gz").write_bytes(gzip.compress(whole.encode()))
    source = write_documents(tmp_path / "a.jsonl", prose(50))
    data = DataConfig(source, validation=str(tmp_path / "val.txt.gz"), min_chars=40, max_tokens_per_char=0.9)
    prepared = prepare(data, SMALL_BPE)
    assert documents_of(prepared.validation, prepared) == [whole]
    assert prepared.validation.text_bytes == len(whole.encode())
    assert prepared.validation_text.read_text(encoding="utf-8") == whole


def test_blocks_of_a_long_document_join_without_separators(tmp_path: Path):
    text = "".join(f"line {number} of one very long document\n" for number in range(10_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    source = [str(tmp_path / "long.txt"), write_documents(tmp_path / "a.jsonl", ["after it"])]
    validation = write_documents(tmp_path / "val.jsonl", ["held out"])
    prepared = prepare(DataConfig(source, validation=validation), SMALL_BPE)
    assert documents_of(prepared.train, prepared) == [text, "after it"]
    assert prepared.report["stages"]["train"]["documents"] > 5


def test_where_a_block_is_held_out_there_is_a_separator(tmp_path: Path):
    text = "".join(f"line {number} of one very long document\n" for number in range(10_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    prepared = prepare(DataConfig(str(tmp_path / "long.txt"), validation_fraction=0.3), BYTES)
    train, held_out = documents_of(prepared.train, prepared), documents_of(prepared.validation, prepared)
    assert len(train) > 1
    assert all(part in text for part in [*train, *held_out])
    assert sum(map(len, train)) + sum(map(len, held_out)) == len(text)


def test_training_text_that_is_held_out_is_dropped(tmp_path: Path):
    texts = prose(20)
    validation = write_documents(tmp_path / "val.jsonl", texts[5:8])
    prepared = prepare(DataConfig(write_documents(tmp_path / "a.jsonl", texts), validation=validation), BYTES)
    assert documents_of(prepared.train, prepared) == texts[:5] + texts[8:]
    assert prepared.report["stages"]["duplicate"]["documents"] == 3


@pytest.mark.parametrize("kilobytes", [10, 100])
def test_a_corpus_of_one_short_file_still_holds_something_out(tmp_path: Path, kilobytes: int):
    line = "short file {:06} here it is\n"
    (tmp_path / "a.txt").write_text(
        "".join(line.format(n) for n in range(kilobytes * 1000 // len(line))), encoding="utf-8"
    )
    prepared = prepare(DataConfig(str(tmp_path / "a.txt")), BYTES)
    assert 0 < prepared.validation.text_bytes < prepared.train.text_bytes


def test_every_stage_is_counted(tmp_path: Path):
    noise = "".join(chr(33 + n * 7919 % 90) for n in range(60))
    texts = [*prose(100), *prose(7), "tiny", noise]
    data = DataConfig(write_documents(tmp_path / "a.jsonl", texts), min_chars=5, max_tokens_per_char=0.8)
    prepared = prepare(data, SMALL_BPE)
    stages = prepared.report["stages"]
    assert stages["read"]["documents"] == 109
    assert stages["read"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert [stages[name]["documents"] for name in ("short", "duplicate", "incompressible")] == [1, 7, 1]
    assert stages["train"]["documents"] + stages["validation"]["documents"] == 100
    assert stages["train"]["tokens"] == len(prepared.train.tokens)


def test_cramming_filter_compares_tokens_with_characters(tmp_path: Path):
    # Bytes: one token a character in ASCII, two in é. A document is kept if tokens < 1.5 · characters.
    texts = [*prose(20), "é" * 10, "é" * 5 + "e" * 5, "é" * 4 + "e" * 6]
    prepared = prepare(DataConfig(write_documents(tmp_path / "a.jsonl", texts), max_tokens_per_char=1.5), BYTES)
    kept = documents_of(prepared.train, prepared) + documents_of(prepared.validation, prepared)
    assert set(texts) - set(kept) == {texts[20], texts[21]}


def test_reading_stops_at_the_limit(tmp_path: Path):
    texts = [f"{number:09}é" for number in range(100)]  # 11 bytes each
    source = write_documents(tmp_path / "a.jsonl", texts)
    prepared = prepare(DataConfig(source, limit_bytes=110), BYTES)
    assert prepared.report["stages"]["read"]["documents"] == 10
    assert prepared.report["stages"]["read"]["bytes"] == 110


def test_the_tokenizer_sees_every_file_in_proportion_and_nothing_held_out(tmp_path: Path):
    for name, count in (("a", 100), ("b", 300)):
        (tmp_path / f"{name}.txt").write_text(
            "|".join(f"{name}{number:07}" for number in range(count)), encoding="utf-8"
        )
    data = DataConfig(str(tmp_path / "*.txt"), document_separator="|", validation_fraction=0.25)
    sources = module.find_sources(data.source)
    job = module._Job(data, TokenizerConfig(train_bytes=800), sources, None, lambda sentence: None)
    sample = list(module._sample(job))
    assert (sum(text[0] == "a" for text in sample), sum(text[0] == "b" for text in sample)) == (25, 75)
    prepared = prepare(data, BYTES)
    assert not set(sample) & set(documents_of(prepared.validation, prepared))
    everything = dataclasses.replace(job, tokenizer=TokenizerConfig(train_bytes=10**9))
    assert list(module._sample(everything)) == documents_of(prepared.train, prepared)


class TestCache:
    def test_prepares_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(50)))
        first = prepare(data, SMALL_BPE)
        monkeypatch.setattr(module, "_prepare_into", None)  # Whoever prepares now fails.
        second = prepare(dataclasses.replace(data, sequence_length=7, order="sentence_length"), SMALL_BPE)
        assert second.path == first.path
        assert second.report == first.report
        assert second.tokenizer.to_json() == first.tokenizer.to_json()
        np.testing.assert_array_equal(second.train.tokens, first.train.tokens)
        assert second.train.sentence_ends == first.train.sentence_ends != ()

    def test_everything_that_shapes_the_files_has_its_own_entry(self, tmp_path: Path):
        source = write_documents(tmp_path / "a.jsonl", prose(60))
        data = DataConfig(source)
        changed = [
            dataclasses.replace(data, validation=write_documents(tmp_path / "val.jsonl", prose(2, seed=1))),
            dataclasses.replace(data, validation_fraction=0.5),
            dataclasses.replace(data, limit_bytes=1000),
            dataclasses.replace(data, normalize="ascii_lower"),
            dataclasses.replace(data, max_tokens_per_char=5.0),
            dataclasses.replace(data, min_chars=2),
            dataclasses.replace(data, deduplicate=False),
        ]
        paths = [prepare(config, BYTES).path for config in (data, *changed)]
        paths += [prepare(data, SMALL_BPE).path, prepare(data, TokenizerConfig(vocab_size=310)).path]
        write_documents(tmp_path / "a.jsonl", prose(61))
        paths.append(prepare(data, BYTES).path)
        assert len(set(paths)) == len(paths)

    def test_a_loaded_tokenizer_counts_by_its_contents(self, tmp_path: Path):
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(60)))
        config = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
        trained = prepare(data, SMALL_BPE)
        trained.tokenizer.save(tmp_path / "tokenizer.json")
        first = prepare(data, config)
        np.testing.assert_array_equal(first.train.tokens, trained.train.tokens)
        prepare(data, TokenizerConfig(vocab_size=310)).tokenizer.save(tmp_path / "tokenizer.json")
        assert prepare(data, config).path != first.path

    def test_an_interrupted_preparation_starts_over(
        self, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ):
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(50)))
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_description", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(data, BYTES)
        assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]
        finished = prepare(data, BYTES)
        expected = np.array(finished.train.tokens)  # A copy: the file under the map is about to shrink.
        # As a killed process leaves it: part of the files under the unfinished name.
        leftover = finished.path.rename(finished.path.with_suffix(".unfinished"))
        (leftover / "train.tokens").write_bytes(b"xx")
        np.testing.assert_array_equal(prepare(data, BYTES).train.tokens, expected)
        assert not leftover.exists()

    @pytest.mark.parametrize("damage", ["train.tokens", "prepared.json"])
    def test_damaged_files_are_prepared_again(self, tmp_path: Path, damage: str):
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(50)))
        first = prepare(data, BYTES)
        tokens = np.array(first.train.tokens)
        (first.path / damage).write_bytes(
            (first.path / damage).read_bytes()[:-4]
        )  # Whole tokens, so only counting tells.
        np.testing.assert_array_equal(prepare(data, BYTES).train.tokens, tokens)

    def test_at_once_only_one_prepares(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(50)))
        both_are_here, calls, said, found = threading.Event(), [], [], []
        really_prepare = module._prepare_into

        def slowly(*args) -> None:
            calls.append(args)
            assert both_are_here.wait(10)
            really_prepare(*args)

        def progress(sentence: str) -> None:
            said.append(sentence)
            both_are_here.set()

        monkeypatch.setattr(module, "_prepare_into", slowly)
        threads = [
            threading.Thread(target=lambda: found.append(prepare(data, BYTES, progress=progress))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert said == ["waiting for another process that prepares the same data"]
        np.testing.assert_array_equal(found[0].train.tokens, found[1].train.tokens)

    def test_progress_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
        said = []
        prepare(DataConfig(write_documents(tmp_path / "a.jsonl", prose(50))), SMALL_BPE, progress=said.append)
        assert said[0].startswith("reading text to train the tokenizer: 0 MB of 32")
        assert said[-1] == "tokenizing: 0 MB of 0"


class TestErrors:
    def check(self, message: str, data: DataConfig, own_cache: Path) -> None:
        with pytest.raises(DataError, match=message):
            prepare(data, BYTES)
        assert not own_cache.exists() or not [path for path in own_cache.iterdir() if path.suffix != ".lock"]

    def test_empty_corpus(self, tmp_path: Path, own_cache: Path):
        (tmp_path / "a.txt").write_text("", encoding="utf-8")
        self.check("no training text is left .* of 0 documents read", DataConfig(str(tmp_path / "a.txt")), own_cache)

    def test_everything_dropped(self, tmp_path: Path, own_cache: Path):
        source = write_documents(tmp_path / "a.jsonl", ["ab", "cd", "ef"])
        message = "of 3 documents read, dropped were 3 short, 0 duplicate, 0 incompressible"
        self.check(message, DataConfig(source, min_chars=3), own_cache)

    def test_training_on_the_held_out_text(self, tmp_path: Path, own_cache: Path):
        source = write_documents(tmp_path / "a.jsonl", prose(9))
        self.check("dropped were 0 short, 9 duplicate", DataConfig(source, validation=source), own_cache)

    def test_one_document(self, tmp_path: Path, own_cache: Path):
        source = write_documents(tmp_path / "a.jsonl", ["the only one"])
        self.check(r"has 1 document\(s\), too few to hold some out", DataConfig(source), own_cache)

    def test_empty_validation(self, tmp_path: Path, own_cache: Path):
        source = write_documents(tmp_path / "a.jsonl", prose(9))
        (tmp_path / "val.txt").write_text("", encoding="utf-8")
        self.check(
            "data.validation .* holds no text", DataConfig(source, validation=str(tmp_path / "val.txt")), own_cache
        )

    def test_binary_corpus(self, tmp_path: Path, own_cache: Path):
        (tmp_path / "a.txt").write_bytes(b"\x7fELF\x00\x00")
        self.check("binary, not text", DataConfig(str(tmp_path / "a.txt")), own_cache)

    def test_a_share_that_is_none(self):
        with pytest.raises(ConfigError, match=r"validation_fraction is 1\.5; it must be between 0 and 1"):
            prepare(DataConfig(validation_fraction=1.5), BYTES)

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        data = DataConfig(write_documents(tmp_path / "a.jsonl", prose(9)), cache_dir=str(tmp_path / "file" / "cache"))
        with pytest.raises(DataError, match=r"prepared data cannot be kept: Not a directory .* set data\.cache_dir"):
            prepare(data, BYTES)
