"""What steps are timed on: tokens as frequent as a text's."""

import math

import numpy as np
import pytest

from cramjax.kernels.cross_entropy.adaptive import tail_shares
from cramjax.planning.measure import zipf_tokens


def test_tokens_follow_zipfs_law() -> None:
    tokens = zipf_tokens(8192, (1000, 1000))
    assert tokens.min() == 0 and tokens.max() == 8191 and tokens.dtype == np.int32
    for rank in (1, 10, 1024, 4096):
        # The integral of 1/(1 + x) to that rank; of a million draws, within five standard deviations.
        assert np.mean(tokens < rank) == pytest.approx(math.log(rank + 1) / math.log(8193), abs=5 * 0.5e-3)


def test_the_tails_of_an_adaptive_softmax_have_room_for_them() -> None:
    # Uniform tokens overflow every tail: gpt-mini's step then takes a quarter longer than on text.
    tokens, cuts = zipf_tokens(8192, (32, 129)), (1024, 4096, 8192)
    for share, first, end in zip(tail_shares(2), cuts, cuts[1:], strict=False):
        assert np.mean((first <= tokens) & (tokens < end)) < share
