"""Text of tokens one at a time, beside the text of all of them at once."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from cramjax.config import TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.tokenizer import make_tokenizer
from cramjax.serve.prompts import text_after
from cramjax.serve.text import StopStrings, TextStream

_TEXT = "naïve 🙂 café — the end. ありがとう 👩‍👩‍👧 don't stop\n"


def _with_bytes() -> Tokenizer:
    """As Llama 2's: words that begin with a mark, and bytes of what has no token, decoded together or not at all."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁the", "the", "."]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, separator_id=2, mask_id=None, pad_id=0)


_TOKENIZERS = {
    "bpe": make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [_TEXT * 20]),
    "bytes": make_tokenizer(TokenizerConfig(kind="bytes"), [_TEXT]),
    "wordpiece": make_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=120), [_TEXT * 20]),
    "byte fallback": _with_bytes(),
}


@pytest.mark.parametrize("name", _TOKENIZERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_joined_are_the_whole_text(name: str, data: st.DataObject):
    tokenizer = _TOKENIZERS[name]
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24)
    prompt, drawn = tokenizer.encode(data.draw(st.sampled_from(["", "the a", _TEXT]))), data.draw(ids)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in drawn]
    assert "".join(pieces) + stream.end() == text_after(tokenizer, prompt, drawn)


def test_a_special_token_between_bytes_of_a_character_is_as_if_it_were_not_there():
    tokenizer, drawn = _TOKENIZERS["byte fallback"], [3, 0, 131]  # <0x00> <unk> <0x80>
    stream = TextStream(tokenizer, [])
    assert "".join(map(stream.add, drawn)) + stream.end() == text_after(tokenizer, [], drawn)


@pytest.mark.parametrize("name", ["bpe", "bytes", "byte fallback"])
def test_no_piece_holds_a_part_of_a_character(name: str):
    tokenizer = _TOKENIZERS[name]
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(token) for token in tokenizer.encode("a🙂 é 👩‍👩‍👧.")] + [stream.end()]
    assert "".join(pieces) == "a🙂 é 👩‍👩‍👧." and all("\ufffd" not in piece for piece in pieces)


def _until(text: str, stops: list[str], keep: bool) -> str:
    """By the definition: read character by character until one of them is there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if keep else text[: end - max(map(len, ending))]
    return text


@given(
    st.lists(st.text("ab🙂", max_size=4), max_size=12),
    st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
@settings(deadline=None)
def test_a_stop_string_ends_the_text_however_it_is_cut(pieces: list[str], stops: list[str], keep: bool):
    stop = StopStrings(tuple(stops), keep)
    given = []
    for piece in pieces:
        given.append(stop.add(piece))
        if stop.found:
            break
    assert "".join(given) + stop.rest() == _until("".join(pieces), stops, keep)


def test_what_cannot_become_a_stop_string_is_not_held_back():
    stop = StopStrings(("END",))
    assert [stop.add(piece) for piece in ("a", "bE", "N", "x", "EN", "D!")] == ["a", "b", "", "ENx", "", ""]
    assert stop.found and stop.rest() == ""


def test_special_tokens_are_shown_where_asked_for():
    tokenizer = _TOKENIZERS["bpe"]
    ids = [*tokenizer.encode("the"), tokenizer.separator_id]
    for special, text in ((False, "the"), (True, "the<sep>")):
        stream = TextStream(tokenizer, [], shown=tokenizer.special_ids if special else ())
        assert "".join([*map(stream.add, ids), stream.end()]) == text
