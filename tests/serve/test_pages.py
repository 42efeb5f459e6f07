"""The pool of pages under any sequence of requests, against a list of who has what."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cramjax.serve.engine.pages import NOBODY, PagePool, page_keys
from cramjax.serve.engine.schedule import Held, pages_for, pages_missing, plan_pieces, plan_steps

SIZE = 2


class Pool(RuleBasedStateMachine):
    """Texts are admitted, grow, are forked and freed; what is written must stay while someone has it."""

    @initialize(pages=st.integers(2, 9))
    def begin(self, pages: int) -> None:
        self.pool = PagePool(pages, SIZE)
        self.texts: list[tuple[list[int], list[int]]] = []  # tokens, pages
        self.written: dict[int, tuple[int, ...]] = {}  # the whole text up to the end of a page, by page

    def _write(self, tokens: list[int], pages: list[int], start: int) -> None:
        keys = page_keys(tokens, SIZE)
        for place in range(start, len(pages)):
            self.written[pages[place]] = tuple(tokens[: (place + 1) * SIZE])
            if place < len(keys):
                self.pool.know(pages[place], keys[place])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def admit(self, tokens: list[int]) -> None:
        before = list(self.pool._free), self.pool.queried, self.pool.found
        keys, number = page_keys(tokens[:-1], SIZE), pages_for(len(tokens), SIZE)
        begun = self.pool.begin(keys, number)
        if begun is None:
            assert (list(self.pool._free), self.pool.queried, self.pool.found) == before
            held = {page for _, pages in self.texts for page in pages}
            known = {text: page for page, text in self.written.items() if self.pool._key_of.get(page)}
            beginnings = (tuple(tokens[: place * SIZE]) for place in range(1, len(keys) + 1))
            shared = [known[text] for text in itertools.takewhile(known.__contains__, beginnings)]
            assert number - sum(page in held for page in shared) > self.pool.free
            return
        found, new = begun
        assert len(found) + len(new) == number
        assert (self.pool.queried, self.pool.found) == (before[1] + len(keys), before[2] + len(found))
        for place, page in enumerate(found):  # what was found is what the text begins with
            assert self.written[page] == tuple(tokens[: (place + 1) * SIZE])
        self.texts.append((tokens, [*found, *new]))
        self._write(tokens, [*found, *new], len(found))

    @precondition(lambda self: self.texts)
    @rule(number=st.integers(0, 99), token=st.integers(0, 1))
    def append(self, number: int, token: int) -> None:
        tokens, pages = self.texts[number % len(self.texts)]
        grown = [*tokens, token]
        if len(tokens) % SIZE:  # into its own last page
            own = [page for _, others in self.texts for page in others]
            if own.count(pages[-1]) > 1:
                return  # forked: a page that is shared is not written to
        else:
            taken = self.pool.take(1)
            if taken is None:
                return
            pages += taken
        self.texts[number % len(self.texts)] = (grown, pages)
        self._write(grown, pages, len(pages) - 1)

    @precondition(lambda self: self.texts)
    @rule(number=st.integers(0, 99))
    def fork(self, number: int) -> None:
        tokens, pages = self.texts[number % len(self.texts)]
        self.pool.share(pages)
        self.texts.append((list(tokens), list(pages)))

    @precondition(lambda self: self.texts)
    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        _, pages = self.texts.pop(number % len(self.texts))
        self.pool.release(pages)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = {page for _, pages in self.texts for page in pages}
        assert NOBODY not in held
        assert self.pool.free == self.pool.pages - 1 - len(held)
        for tokens, pages in self.texts:
            for place, page in enumerate(pages):
                assert self.written[page] == tuple(tokens[: (place + 1) * SIZE])


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_page_that_is_nobodys_is_not_released() -> None:
    pool = PagePool(3, SIZE)
    with pytest.raises(ValueError, match="nobody's"):
        pool.release([1])


def test_keys_depend_on_all_that_comes_before() -> None:
    a, b = page_keys([1, 2, 3, 4, 5], 2), page_keys([9, 2, 3, 4], 2)
    assert len(a) == len(b) == 2 and a[1] != b[1]
    assert page_keys([1, 2], 2) == a[:1] != page_keys([1, 2], 2, b"salt")
    assert page_keys(np.array([1, 2]).tolist(), 2) == a[:1]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 3),
    st.permutations(range(5)),
    st.integers(1, 5),
    st.integers(1, 16),
)
def test_who_draws_gets_pages_and_the_oldest_goes_on(
    texts: list[tuple[int, int, int]], spare: int, order: list[int], drawing: int, most: int
) -> None:
    """Texts that begin alike, with pages of their own and more to draw, in a pool that they fill but for a few."""
    beginning, held = 4, dict[int, tuple[Held, list[int]]]()
    shared = [min(common, beginning) for common, _, _ in texts]
    own = [-(-tokens // SIZE) for _, tokens, _ in texts]
    pool = PagePool(1 + max(shared) + sum(own) + spare, SIZE)
    common = pool.take(max(shared)) or []
    for number, (alike, pages, (_, tokens, room)) in enumerate(zip(shared, own, texts, strict=True)):
        pool.share(common[:alike])
        row = Held(number, alike * SIZE + tokens + 1, alike * SIZE + tokens, alike + pages, room)
        held[number] = row, [*common[:alike], *(pool.take(pages) or [])]
    pool.release(common)
    those = {*[number for number in order if number in held][:drawing]}
    while True:
        rows = [row for row, _ in held.values()]
        drawn = [row for row in rows if row.number in those]
        plan = plan_steps(drawn, [row for row in rows if row.number not in those], pool.free, SIZE, most)
        least = sum(pages_for(row.computed + 1, SIZE) - row.pages for row in drawn)
        if plan.preempted is None:
            break
        assert plan.preempted == max(held) != min(held) and least > pool.free
        pool.release(held.pop(plan.preempted)[1])
        pool.check()
    assert 0 in held and (plan.steps >= 1) == bool(drawn) and plan.steps <= most
    needed = [max(pages_for(row.computed + min(plan.steps, row.room), SIZE) - row.pages, 0) for row in drawn]
    assert [pages_missing(row, plan.steps, SIZE) for row in drawn] == needed
    assert all(pool.take(each) is not None for each in needed) or len(held) == 1


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_pieces_are_of_the_first_and_fit_their_shape(lengths: list[int]) -> None:
    shapes = [(1, 16), (1, 64), (1, 256), (4, 16), (4, 64)]
    rows = [Held(number, length, 0, 0, 1) for number, length in enumerate(lengths)]
    (batch, long), pieces = plan_pieces(rows, shapes)
    assert (batch, long) in shapes and pieces[0][0] == 0
    assert [number for number, _ in pieces] == list(range(min(batch, len(rows))))
    assert all(count == min(lengths[number], long) for number, count in pieces)
