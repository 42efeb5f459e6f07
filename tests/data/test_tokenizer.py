"""Tokenizers: trained or loaded, exact on any text, and fast without being different."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from cramjax.config import TokenizerConfig
from cramjax.data import encode
from cramjax.data.tokenizer import BPE_WORD, Tokenizer, make_tokenizer, require_mask, sentence_ends
from cramjax.errors import DataError

PROSE = [
    f"The whale number {number} isn't here; it's under the {number * 37 % 101} waves. Call me “Ishmael”!\n    def f()"
    for number in range(200)
]
# Everything that engines of regular expressions are known to see differently: separators, controls, marks, digits.
ODD = st.text(
    alphabet=st.sampled_from("ab Zé'st012٣½ \t\n\r\f\v\x1c\x85\xa0\u2028\u3000.,_-[](){}—“”…·¿ß中文\u0301😀\u200d")
)


def trained(kind: str, normalize: str = "none", vocab_size: int = 300) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), PROSE, normalize)  # pyright: ignore[reportArgumentType]


BPE, WORDPIECE, BYTES = trained("bpe"), trained("wordpiece"), trained("bytes")


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=st.text() | ODD)
@settings(deadline=None)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str):
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("tokenizer", [BPE, WORDPIECE, BYTES], ids=["bpe", "wordpiece", "bytes"])
@given(texts=st.lists(st.text() | ODD, max_size=4))
@settings(deadline=None, max_examples=200)
def test_fast_encoding_is_the_librarys(tokenizer: Tokenizer, texts: list[str]):
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


def test_bytes_are_bytes():
    text = "naïve\n—"
    np.testing.assert_array_equal(BYTES.encode_batch([text])[0], np.frombuffer(text.encode(), np.uint8))
    assert BYTES.encode(text) == list(text.encode())
    assert (BYTES.vocab_size, BYTES.separator_id, BYTES.mask_id) == (258, 256, 257)


def test_wordpiece_spells_words_with_pieces():
    text = "the whale is under waves"
    pieces = [WORDPIECE.backend.id_to_token(index) for index in WORDPIECE.encode(text)]
    assert "".join(pieces).replace("##", "") == text.replace(" ", "")
    assert WORDPIECE.decode(WORDPIECE.encode(text)) == text
    assert len(pieces) < len(text) / 2


def test_vocabulary_has_the_asked_size_and_special_tokens():
    for tokenizer in (BPE, WORDPIECE):
        assert tokenizer.vocab_size == 300 == len(tokenizer.backend.get_vocab())
        assert (tokenizer.token(tokenizer.separator_id), tokenizer.token(require_mask(tokenizer))) == (
            "<sep>",
            "[MASK]",
        )
        assert tokenizer.pad_id == tokenizer.separator_id


def test_training_twice_gives_the_same_tokenizer():
    assert trained("bpe").to_json() == BPE.to_json()


def test_names_of_special_tokens_are_text():
    text = "a [MASK] <sep>[UNK]"
    for tokenizer in (BPE, WORDPIECE, BYTES):
        special = {tokenizer.mask_id, tokenizer.separator_id}
        assert special < set(tokenizer.backend.encode(text, add_special_tokens=False).ids)  # the library's own reading
        assert not special & set(tokenizer.encode(text))
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist()
    for tokenizer in (BPE, BYTES):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_are_normalised_as_the_data_was():
    tokenizer = trained("wordpiece", "ascii_lower")
    assert tokenizer.encode("Thé WHALE") == tokenizer.encode_batch(["the whale"])[0].tolist()
    assert tokenizer.encode("the [MASK]") == tokenizer.encode_batch(["the [mask]"])[0].tolist()


def test_decoding_shows_special_tokens_on_request():
    ids = [BPE.separator_id, *BPE.encode("The whale")]
    assert BPE.decode(ids) == "The whale"
    assert BPE.decode(ids, special=True) == "<sep>The whale"


def test_save_and_load(tmp_path: Path):
    for tokenizer in (BPE, WORDPIECE, BYTES):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.to_json() == tokenizer.to_json()
        assert (loaded.vocab_size, loaded.separator_id, loaded.mask_id) == (
            tokenizer.vocab_size, tokenizer.separator_id, tokenizer.mask_id,
        )  # fmt: skip
        np.testing.assert_array_equal(loaded.encode_batch(PROSE[:1])[0], tokenizer.encode_batch(PROSE[:1])[0])


def test_words_are_encoded_once_until_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch):
    class Asked:
        words: list[str] = []

        def encode_batch_fast(self, words: list[str], **options) -> list[tokenizers.Encoding]:
            self.words = self.words + words
            return BPE.backend.encode_batch_fast(words, **options)

    text = "the whale the whale"
    for cache_bytes, times in ((10**6, 1), (1, 2)):
        monkeypatch.setattr(encode, "CACHE_BYTES", cache_bytes)
        backend = Asked()
        encoder = encode.word_encoder(backend, BPE_WORD, BPE.dtype)  # pyright: ignore[reportArgumentType]
        encoded = [encoder([text])[0].tolist() for _ in range(2)]
        assert encoded == [BPE.encode(text)] * 2
        assert sorted(backend.words) == sorted(["the", " whale", " the"] * times)


def test_wide_vocabularies_have_wide_ids():
    assert BPE.dtype == np.uint16
    backend = tokenizers.Tokenizer(models.WordLevel({"<sep>": 0, "x": 1 << 16}, unk_token="<sep>"))
    assert Tokenizer(backend, 0, None, 0).dtype == np.uint32


def test_sentence_ends_are_found_in_the_vocabulary():
    ends = {BPE.token(index).strip() for index in sentence_ends(BPE)}
    assert {".", "!", "?"} <= ends
    assert all(end[-1] in ".!?" for end in ends)


def foreign(tmp_path: Path, *special: str, post: bool = False) -> Path:
    """A tokenizer.json from elsewhere: another splitter, other names, and an added token at the start."""
    names = [*special, "the", "whale", "?"]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    if post:
        backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("special", "separator", "mask"),
    [(["[CLS]", "[SEP]", "[MASK]"], 1, 2), (["</s>", "<mask>"], 0, 1), (["<|endoftext|>"], 0, None)],
)
def test_loaded_tokenizers_may_use_other_names(tmp_path: Path, special: list[str], separator: int, mask: int | None):
    path = foreign(tmp_path, *special, post="[CLS]" in special)
    tokenizer = make_tokenizer(TokenizerConfig(kind="file", path=str(path)), [])
    assert (tokenizer.separator_id, tokenizer.mask_id) == (separator, mask)
    expected = [len(special), len(special) + 1]
    assert tokenizer.encode("the whale") == tokenizer.encode_batch(["the whale"])[0].tolist() == expected
    literal = tokenizer.encode_batch([f"the {special[separator]} whale"])[0]
    assert separator not in literal and separator not in tokenizer.encode(f"the {special[separator]} whale")


def test_loaded_tokenizers_without_special_tokens(tmp_path: Path):
    with pytest.raises(DataError, match=r"Its special tokens are \['<pad>'\]; one of <sep>, \[SEP\], .* is needed"):
        Tokenizer.load(foreign(tmp_path, "<pad>"))
    with pytest.raises(DataError, match="has no mask token, which the masked objective needs"):
        require_mask(Tokenizer.load(foreign(tmp_path, "</s>")))


def test_files_that_are_no_tokenizers(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="no such tokenizer file"):
        Tokenizer.load(path)
    path.write_text(json.dumps({"model": "none"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(path)
    with pytest.raises(DataError, match=r"tokenizer\.path is not set"):
        make_tokenizer(TokenizerConfig(kind="file"), [])


@pytest.mark.parametrize(("kind", "least"), [("bpe", 258), ("wordpiece", 97)])
def test_vocabularies_too_small_for_the_alphabet(kind: str, least: int):
    with pytest.raises(DataError, match=f"vocab_size is {least - 1}; {kind} needs at least {least}"):
        trained(kind, vocab_size=least - 1)


def test_parts_of_special_tokens_are_kept_where_names_do_not_tell(tmp_path: Path):
    words = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    assert words.to_json() == words.plain_json()
    other = dataclasses.replace(words, separator_id=65, begin_ids=(66,), end_ids=(67, 68), mask_id=None)
    again = Tokenizer.from_json(other.to_json(), "here")
    parts = ("separator_id", "mask_id", "pad_id", "begin_ids", "end_ids")
    assert [getattr(again, name) for name in parts] == [getattr(other, name) for name in parts]
    assert again.encode("ab") == words.encode("ab")
    # In a model directory other libraries read the vocabulary too, and model.yaml says the rest.
    (tmp_path / "tokenizer.json").write_text(other.plain_json(), encoding="utf-8")
    (tmp_path / "model.yaml").write_text(
        "separator_id: 65\nmask_id: null\npad_id: 65\nbegin_ids: [66]\n", encoding="utf-8"
    )
    loaded = make_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")), [])
    assert (loaded.separator_id, loaded.mask_id, loaded.begin_ids, loaded.end_ids) == (65, None, (66,), ())
