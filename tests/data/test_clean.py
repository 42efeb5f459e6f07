"""Normalisation, deduplication in fixed memory, and counting."""

import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.config import DataConfig
from cramjax.data.clean import DigestSet, Tally, clean, normalize
from cramjax.data.files import Document


def run(texts: list[str], filtered: bool = True, **config) -> tuple[list[str], dict[str, int]]:
    tally = Tally()
    kept = clean(map(Document, texts), DataConfig(**config), DigestSet(), tally, filtered=filtered)
    return [document.text for document in kept], {stage: n["documents"] for stage, n in tally.stages.items()}


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("none", "e\u0301 ﬁ", "e\u0301 ﬁ"),
        ("nfc", "e\u0301 ﬁ", "é ﬁ"),
        ("nfkc", "e\u0301 ﬁ", "é fi"),
        ("ascii_lower", "Été — NAÏVE ½ \u212a", "ete  naive  k"),
    ],
)
def test_normal_forms(form: str, text: str, expected: str):
    assert normalize(text, form) == expected


@given(st.text())
@settings(deadline=None)
def test_nfc_is_unicode_nfc(text: str):
    assert normalize(text, "nfc") == unicodedata.normalize("NFC", text)


@given(st.text(), st.sampled_from(["nfc", "nfkc", "ascii_lower"]))
@settings(deadline=None)
def test_normalising_twice_changes_nothing(text: str, form: str):
    assert normalize(normalize(text, form), form) == normalize(text, form)


def test_every_stage_counts_what_it_dropped():
    texts, counts = run(["a long one", "  b ", "a long one", "another", ""], min_chars=2)
    assert texts == ["a long one", "another"]
    assert counts == {"read": 5, "short": 2, "duplicate": 1, "incompressible": 0}


def test_bytes_and_characters_are_counted_after_normalisation():
    tally = Tally()
    list(clean([Document("e\u0301e")], DataConfig(), DigestSet(), tally))
    assert tally.stages["read"] == {"documents": 1, "characters": 2, "bytes": 3}


def test_duplicates_are_found_after_normalisation_and_can_be_kept():
    assert run(["e\u0301", "é"])[0] == ["é"]
    assert run(["e\u0301", "é"], deduplicate=False)[0] == ["é", "é"]


def test_unfiltered_text_is_kept_whole():
    assert run(["a", "a", "", " "], filtered=False, min_chars=5)[0] == ["a", "a", "", " "]


def test_half_a_surrogate_pair_is_replaced():
    assert run(["x\ud800y"])[0] == ["x?y"]


def test_draws_are_uniform_and_depend_on_the_text_alone():
    texts = [str(number) for number in range(4000)]
    draws = [document.draw for document in clean(map(Document, texts), DataConfig(), DigestSet(), Tally())]
    backwards = [document.draw for document in clean(map(Document, texts[::-1]), DataConfig(), DigestSet(), Tally())]
    assert draws == backwards[::-1]
    share = sum(draw < 0.1 for draw in draws) / len(draws)
    assert abs(share - 0.1) < 0.02  # four standard errors


@given(st.lists(st.integers(0, 50), max_size=200))
def test_digest_set_is_a_set(digests: list[int]):
    table, known = DigestSet(slots_max=64), set()
    for digest in (max(d, 1) for d in digests):
        assert table.add(digest) == (digest not in known)
        known.add(digest)


def test_digest_set_grows_and_then_says_that_it_is_full():
    table, draw = DigestSet(slots_max=1 << 14), random.Random(0)
    digests = [draw.getrandbits(64) for _ in range(20_000)]
    assert all(table.add(digest) for digest in digests[:12_000])
    assert not table.full
    assert all(table.add(digest) for digest in digests[12_000:])
    assert table.full
    assert not any(table.add(digest) for digest in digests[:12_000])
    assert table.add(digests[-1])  # not remembered
