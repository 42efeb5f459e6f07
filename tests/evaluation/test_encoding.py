"""Where prompts end in tokens, and windows over long texts: by hand, by property, and as the harness cuts them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.data import Tokenizer
from cramjax.data.examples.pieces import Piece, PieceEncoder
from cramjax.evaluation.encoding import encode_answer, encode_pair, windows
from cramjax.language_model import LanguageModel


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 20))
def test_windows_predict_each_token_once_from_as_much_as_fits(ids: list[int], context: int):
    made = list(windows(ids, 0, context))
    assert [token for _, continuation in made for token in continuation] == ids
    done = 0
    for before, continuation in made:
        done += len(continuation)
        assert len(before) + len(continuation) == min(context, done) + 1
        assert [*before, *continuation] == [0, *ids][: done + 1][-(len(before) + len(continuation)) :]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 20))
def test_windows_are_those_of_the_harness(ids: list[int], context: int):
    utils = pytest.importorskip("lm_eval.utils", reason="needs the `eval` extra")
    theirs = utils.get_rolling_token_windows(ids, 0, context, 1)
    assert list(windows(ids, 0, context)) == [utils.make_disjoint_window(each) for each in theirs]


def test_spaces_at_the_end_of_a_prompt_go_to_what_follows(words: Tokenizer):
    context, continuation = encode_pair(words, "The author ", "laughs")
    assert context == [words.separator_id, *words.encode("The author")]
    assert continuation == words.encode("The author laughs")[len(context) - 1 :]
    assert encode_pair(words, "The author", " laughs") == (context, continuation)


def test_a_text_is_encoded_whole_and_then_split(words: Tokenizer):
    """The last token of a prompt may swallow what follows: the split is at the prompt's length all the same."""
    context, continuation = encode_pair(words, "The auth", "or laughs")
    whole = words.encode("The author laughs")
    assert len(words.encode("The auth")) + len(words.encode("or laughs")) != len(whole)
    assert continuation == whole[len(words.encode("The auth")) :]
    assert context == [words.separator_id, *words.encode("The auth")]


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_prompt_is_what_stands_before_a_text(words: Tokenizer, context: str):
    assert encode_pair(words, context, "laughs") == ([words.separator_id], words.encode(f"{context}laughs"))


def test_names_of_special_tokens_are_text_unless_a_template_put_them(causal: LanguageModel):
    words = causal.tokenizer
    assert words.mask_id is not None
    separator, mask = (words.backend.id_to_token(index) for index in (words.separator_id, words.mask_id))
    assert words.mask_id not in encode_pair(words, f"{mask} a", "b")[0]
    encoder = PieceEncoder(words)
    question = [Piece(mask, False, special=True), Piece(f" a{mask} \n", False)]
    context, answer = encode_answer(encoder, question, f"b{mask}")
    assert context == [words.separator_id, words.mask_id, *words.encode(f" a{mask}")]
    assert context[2:] + answer == words.encode(f" a{mask} \nb{mask}")
    # What a chat template has put before a text is not put there again.
    question = [Piece(separator, False, special=True), Piece("a", False)]
    assert encode_answer(encoder, question, "b")[0] == [words.separator_id, *words.encode("a")]
