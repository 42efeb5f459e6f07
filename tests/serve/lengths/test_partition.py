"""Which texts go together: no way of cutting a sorted list costs less, and no text is lost."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.serve.lengths import Batch, Costs, Programs, batches, ragged_of
from cramjax.serve.lengths.batches import MOST_TEXTS
from cramjax.serve.lengths.partition import partition
from cramjax.serve.lengths.shapes import MOST_PLACES, Shape, shape_of


def cuts(count: int, most: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut a list into runs of at most so many."""
    for ends in itertools.product([False, True], repeat=count - 1):
        stops = [place + 1 for place, end in enumerate(ends) if end] + [count]
        runs = list(zip([0, *stops[:-1]], stops, strict=True))
        if all(stop - start <= most for start, stop in runs):
            yield runs


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=10).map(sorted),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_it_is_the_best_of_all_cuts(lengths: list[int], most: int, seed: int, forbids: bool):
    """For a table of any costs, some of them infinite: nothing is asked of it."""
    table = np.random.default_rng(seed).exponential(size=(101, 11, 1001))
    if forbids:
        table[:, 2:][table[:, 2:] > 1.5] = np.inf
    runs = partition(lengths, lambda longest, texts, tokens: table[longest, texts, tokens], most)

    def total(runs: list[tuple[int, int]]) -> float:
        return sum(table[lengths[stop - 1], stop - start, sum(lengths[start:stop])] for start, stop in runs)

    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])] and runs[-1][1] == len(lengths)
    assert all(stop - start <= most for start, stop in runs)
    assert total(runs) == pytest.approx(min(map(total, cuts(len(lengths), most))))


def test_of_nothing_there_are_no_runs_and_no_batches():
    assert partition([], lambda *_: np.zeros(0), 5) == [] and batches([], costs()) == []


def test_unsorted_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths must not fall"):
        partition([2, 1], lambda longest, texts, tokens: np.ones(longest.shape), 5)


def costs(context: int = 3000) -> Costs:
    return Costs(context, 2e7, 2e4)


def held(batch: Batch, lengths: list[int]) -> list[int]:
    return [lengths[text] for text in batch.texts]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300), st.sampled_from([0.0, 2.0]))
def test_batches_hold_each_text_once_and_fit_their_shapes(lengths: list[int], compiling: float):
    made = batches(lengths, costs(), Programs(compiling))
    assert sorted(text for batch in made for text in batch.texts) == list(range(len(lengths)))
    for batch in made:
        own = held(batch, lengths)
        assert max(own) <= batch.shape.longest <= 3000 and len(own) <= batch.shape.rows
        assert sum(own) <= batch.shape.places <= batch.shape.padded
        assert len(own) == 1 or batch.shape.places <= MOST_PLACES and len(own) <= MOST_TEXTS
        lies = ragged_of(batch, [[1] * length for length in lengths])
        assert np.asarray(lies.tokens).sum() == sum(own)
    longest = [max(held(batch, lengths)) for batch in made]
    assert longest == sorted(longest, reverse=True)


def test_programs_are_compiled_for_what_saves_more_than_that_takes():
    lengths = np.random.default_rng(0).integers(2, 600, 400).tolist()
    shapes = {each: [batch.shape for batch in batches(lengths, costs(), Programs(each))] for each in (0.0, 2.0, 1e9)}
    many, some, few = (len(set(own)) for own in shapes.values())
    assert few < some < many
    seconds = {compiling: sum(float(costs().of_shape(shape)) for shape in own) for compiling, own in shapes.items()}
    assert seconds[0.0] <= seconds[2.0] < seconds[0.0] + 2.0 * (many - some)


@given(st.integers(1, 3000), st.integers(1, 300), st.data())
def test_shapes_are_few_and_near(longest: int, texts: int, data: st.DataObject):
    tokens = data.draw(st.integers(longest + texts - 1, longest * texts))
    shape = shape_of(longest, texts, tokens, 3000)
    assert longest <= shape.longest <= max(16, 1.5 * longest) and texts <= shape.rows <= 1.5 * texts
    assert tokens <= shape.places <= max(tokens + 63, 1.125 * tokens, 64)
    assert all(bin(side).count("1") in (1, 2) or side == 3000 for side in map(int, (shape.rows, shape.longest)))


def test_shapes_of_arrays_are_those_of_each():
    whole = shape_of(np.array([5, 70, 512]), np.array([1, 9, 3]), np.array([5, 300, 1100]), 512)
    each = [shape_of(5, 1, 5, 512), shape_of(70, 9, 300, 512), shape_of(512, 3, 1100, 512)]
    assert [Shape(*map(int, side)) for side in each] == [Shape(16, 1, 16), Shape(320, 12, 96), Shape(1152, 3, 512)]
    np.testing.assert_array_equal(np.stack(whole), np.stack([np.array(side) for side in zip(*each, strict=True)]))


def test_who_asks_again_is_given_what_there_is_until_that_has_cost_a_compilation():
    programs, made = Programs(1.0), costs()
    (large,) = batches([500] * 2, made, programs)
    own = shape_of(300, 1, 300, 3000)
    more = float(made.of_shape(large.shape)) - float(made.of_shape(own))
    assert 0 < more < 1.0
    given = [batches([300], made, programs)[0].shape for _ in range(int(1.0 / more) + 3)]
    assert given == [large.shape] * int(1.0 / more) + [Shape(*map(int, own))] * 3
