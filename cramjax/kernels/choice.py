"""How a kernel's implementation is chosen: the first of an order that does not refuse, or the one asked for by name."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cramjax.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """A way to compute what a kernel computes, and why it may refuse."""

    name: str
    compute: Callable[..., Any]
    refusal: Callable[..., str | None]
    """Takes the problem (what depends on the kernel) and gives the reason why this cannot compute it on the device that
    is traced for; None when it can."""


def nothing_in(*shapes: tuple[int, ...]) -> str | None:
    """Why a kernel without programs cannot run: an array is empty; None where none is."""
    if all(0 not in shape for shape in shapes):
        return None
    return f"there is nothing to compute in shape{'s' * (len(shapes) > 1)} {' and '.join(map(str, shapes))}"


def never(*_: Any) -> None:
    """The refusal of what runs anywhere."""


def choose(kernel: str, implementations: Sequence[Implementation], name: str | None, *problem: Any) -> Implementation:
    """The implementation to use; each refusal on the way to it is logged once, with its reason.

    Args:
        kernel: what is computed, as messages call it.
        implementations: in the order in which they are tried. The last of them refuses nothing.
        name: the one that was asked for; None: the first that can run.
        problem: what refusals read.

    Raises:
        ConfigError: the implementation asked for does not exist or cannot run here.
    """
    known = [each.name for each in implementations]
    if name is not None and name not in known:
        raise ConfigError(f"There is no {kernel} implementation {name!r}: choose from {', '.join(known)}.")
    for each in implementations:
        if name not in (None, each.name):
            continue
        reason = each.refusal(*problem)
        if reason is None:
            return each
        if name is not None:
            raise ConfigError(f"{kernel.capitalize()} implementation {name!r} cannot run here: {reason}.")
        _log_refusal(kernel, each.name, reason)
    raise AssertionError(f"the last implementation of {kernel} refuses nothing")


@functools.cache
def _log_refusal(kernel: str, name: str, reason: str) -> None:
    _log.info("%s: not %s, because %s", kernel, name, reason)
