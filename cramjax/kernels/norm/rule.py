"""What is static about a norm."""

from typing import NamedTuple


class Rule(NamedTuple):
    """Which norm is computed."""

    centred: bool
    """Whether the mean is subtracted first."""
    eps: float
    """Added to the mean square."""
    beside: bool
    """Whether the input is used beside its normalised copy, so that it has a gradient of its own."""
