"""The pool of pages under any sequence of requests, against a list of who has what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cramjax.serve.engine.pages import NOBODY, PagePool, page_keys
from cramjax.serve.engine.schedule import Held, pages_for, plan_pieces, plan_steps

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
        found = self.pool.match(page_keys(tokens, SIZE)[: (len(tokens) - 1) // SIZE])
        for place, page in enumerate(found):  # what was found is what the text begins with
            assert self.written[page] == tuple(tokens[: (place + 1) * SIZE])
        free = self.pool.free
        needed = pages_for(len(tokens), SIZE) - len(found)
        pages = self.pool.take(needed)
        assert (pages is None) == (needed > free)
        if pages is None:
            self.pool.release(found)
            return
        self.texts.append((tokens, [*found, *pages]))
        self._write(tokens, [*found, *pages], len(found))

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


HELD = st.builds(
    lambda number, length, extra, room: Held(number, length, length - 1, pages_for(length, SIZE) + extra, room),
    st.integers(0, 99),
    st.integers(2, 12),
    st.integers(0, 1),
    st.integers(1, 9),
)


@given(
    st.lists(HELD, min_size=1, max_size=5, unique_by=lambda row: row.number),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 16),
)
def test_steps_fit_the_pages_and_the_oldest_goes_on(rows: list[Held], split: int, free: int, most: int) -> None:
    drawing, others = rows[: split + 1], rows[split + 1 :]
    plan = plan_steps(drawing, others, free, SIZE, most)
    by_number = {row.number: row for row in rows}
    given_up = sum(by_number[number].pages for number in plan.preempted)
    kept = [by_number[number] for number in plan.numbers]
    needed = [pages_for(row.computed + min(plan.steps, row.room), SIZE) - row.pages for row in kept]
    left = [row for row in rows if row.number not in plan.preempted]
    assert sum(max(each, 0) for each in needed) <= free + given_up or len(left) == 1
    assert 1 <= plan.steps <= most
    assert {row.number for row in drawing} == {*plan.numbers} | ({*plan.preempted} & {r.number for r in drawing})
    # Whoever gave way is newer than everyone who did not.
    assert all(number > row.number for number in plan.preempted for row in left)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_pieces_are_of_the_first_and_fit_their_shape(lengths: list[int]) -> None:
    shapes = [(1, 16), (1, 64), (1, 256), (4, 16), (4, 64)]
    rows = [Held(number, length, 0, 0, 1) for number, length in enumerate(lengths)]
    (batch, long), pieces = plan_pieces(rows, shapes)
    assert (batch, long) in shapes and pieces[0][0] == 0
    assert [number for number, _ in pieces] == list(range(min(batch, len(rows))))
    assert all(count == min(lengths[number], long) for number, count in pieces)
