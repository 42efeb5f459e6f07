"""Grouped products: rows in groups, each group multiplied with a matrix of its own. What experts are made of."""

from cramjax.kernels.grouped.api import grouped, outer_products
from cramjax.kernels.grouped.groups import (
    Arrangement,
    Groups,
    arrange,
    arrange_within,
    combine,
    dispatch,
    most_blocks,
    rows_of_block,
)

__all__ = [
    "Arrangement",
    "Groups",
    "arrange",
    "arrange_within",
    "combine",
    "dispatch",
    "grouped",
    "most_blocks",
    "outer_products",
    "rows_of_block",
]
