"""Ranges of numbers, as types that the fields of configurations have. The loader (`cramjax.loading`) checks them.

layers: Count = 4
dropout: ShareBelowOne = 0.0
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Which numbers a field may have.

    Attributes:
        words: what a message says of them.
        contains: whether a number is one of them; never of one that is not finite.
    """

    words: str
    contains: Callable[[float], bool]


_AT_LEAST_0 = Range("at least 0", lambda x: 0 <= x < math.inf)
_AT_LEAST_1 = Range("at least 1", lambda x: 1 <= x < math.inf)

Natural = Annotated[int, _AT_LEAST_0]
Count = Annotated[int, _AT_LEAST_1]
NotNegative = Annotated[float, _AT_LEAST_0]
Factor = Annotated[float, _AT_LEAST_1]
Positive = Annotated[float, Range("above 0", lambda x: 0 < x < math.inf)]
Share = Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
ShareBelowOne = Annotated[float, Range("from 0 to below 1", lambda x: 0 <= x < 1)]
InnerShare = Annotated[float, Range("between 0 and 1", lambda x: 0 < x < 1)]
