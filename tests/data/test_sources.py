"""Finding what `data.source` names."""

import json
import os
import sysconfig
from pathlib import Path

import pytest

from cramjax.config import DataConfig
from cramjax.data.sources import find_sources, read_documents, total_bytes
from cramjax.errors import DataError


def texts(source: str | list[str], **config) -> list[str]:
    return [document.text for document in read_documents(find_sources(source), DataConfig(**config))]


def test_standard_library_is_its_python_source_in_order():
    sources = find_sources("stdlib")
    root = Path(sysconfig.get_path("stdlib")).resolve()
    names = [Path(source.name).relative_to(root).as_posix() for source in sources]
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not any({"test", "tests", "site-packages", "__pycache__"} & set(Path(name).parts) for name in names)
    assert sources == find_sources("stdlib")
    assert 5e6 < (total_bytes(sources) or 0) < 5e7


def test_standard_library_is_all_text():
    assert sum(map(len, texts("stdlib"))) > 5e6


def test_globs_are_sorted_and_recursive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    for name in ("c.txt", "a.txt", "b/d.txt", "b/e.md"):
        Path(name).write_text(name, encoding="utf-8")
    assert texts("*.txt") == ["a.txt", "c.txt"]
    assert texts("**/*.txt") == ["a.txt", "b/d.txt", "c.txt"]
    assert texts(["b/*", "a.txt"]) == ["b/d.txt", "b/e.md", "a.txt"]


def test_a_name_with_brackets_is_a_file_if_there_is_one(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("x", encoding="utf-8")
    assert texts(str(tmp_path / "a[1].txt")) == ["x"]


def test_fingerprints_follow_contents(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    (before,) = find_sources(str(path))
    path.write_text("three", encoding="utf-8")
    (after,) = find_sources(str(path))
    os.utime(path, ns=(1, 1))
    (touched,) = find_sources(str(path))
    assert len({before.fingerprint, after.fingerprint, touched.fingerprint}) == 3


def test_total_is_known_for_plain_files_only(tmp_path: Path):
    (tmp_path / "a.txt").write_text("four", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_text("four", encoding="utf-8")
    assert total_bytes(find_sources(str(tmp_path / "a.txt"))) == 4
    assert total_bytes(find_sources(str(tmp_path / "a.*"))) is None
    assert total_bytes(find_sources("hub:someone/something")) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", r"'nowhere\.txt': no such file or directory"),
        ("*.nothing", r"'\*\.nothing' matches no file"),
        (".", r"is a directory, but not one saved by datasets"),
        ([], "empty list"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        find_sources(source)


class TestDatasets:
    """Hugging Face data sets, local: the hub's packaged builders read directories too."""

    def test_saved_to_disk(self, tmp_path: Path):
        import datasets

        data = datasets.Dataset.from_dict({"body": ["one", "two", None], "id": [1, 2, 3]})
        data.save_to_disk(str(tmp_path / "flat"))
        datasets.DatasetDict({"train": data, "other": data.select([0])}).save_to_disk(str(tmp_path / "split"))
        assert texts(str(tmp_path / "flat"), text_field="body") == ["one", "two"]
        assert texts(str(tmp_path / "split"), text_field="body", hub_split="other") == ["one"]
        with pytest.raises(DataError, match=r"no split 'test'\. Set hub_split .* to one of: train, other"):
            texts(str(tmp_path / "split"), hub_split="test")
        with pytest.raises(DataError, match=r"no column 'text'\. Set data\.text_field to one of: body, id"):
            texts(str(tmp_path / "flat"))

    @pytest.mark.parametrize("streaming", [True, False])
    def test_loaded_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{i}"}) for i in range(5)), encoding="utf-8"
        )
        hub = f"hub:{tmp_path / 'set'}"
        assert texts(hub, streaming=streaming) == ["0", "1", "2", "3", "4"]
        with pytest.raises(DataError, match=r"no column 'body'\. Set data\.text_field to one of: text"):
            texts(hub, streaming=streaming, text_field="body")

    def test_names_that_do_not_load(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"hub:/.*nowhere .*cannot be loaded"):
            texts(f"hub:{tmp_path / 'nowhere'}")
