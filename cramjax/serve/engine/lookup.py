"""Tokens guessed from how a text went on before: prompt look-up, a draft of speculative decoding that costs nothing.

Where the last few tokens stood in the text before, what came after them then is guessed to come again (Saxena, 2023,
"Prompt Lookup Decoding"). The model reads all guesses in one call and draws a token after each; those it would have
drawn itself are kept, and the first one that differs takes the place of a guess. So what is answered is what would
have been answered without (Leviathan et al. 2023; here draw n depends on seed and n alone, and is the same draw).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cramjax.serve.engine.batch import Task
from cramjax.serve.engine.draw import needs_history

_LONGEST, _SHORTEST = 3, 2
"""Tokens at the end of a text that are looked for in it."""
_PATIENCE = 4, 64
"""Tokens that are drawn without guesses after one in vain: so many, twice as many after the next, at most so many."""


def guessed(tokens: Sequence[int], most: int) -> list[int]:
    """The tokens that come next if the text goes on as it did before, `most` or none.

    Args:
        tokens: the text.
        most: tokens.
    """
    text = np.asarray(tokens, np.int64)
    for size in range(_LONGEST, _SHORTEST - 1, -1):
        if len(text) <= size:
            continue
        # Windows that end before the last token, and are like the last one.
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        found = np.flatnonzero((windows == text[-size:]).all(axis=1))
        if len(found):
            begin = int(found[-1]) + size
            period = len(text) - begin  # what is guessed past the end repeats what was guessed before it
            return [int(text[begin + number % period]) for number in range(most)]
    return []


def changes(task: Task) -> bool:
    """Whether what a request may draw, or how, depends on what it drew before, so that guesses cannot be verified."""
    return needs_history(task.request.sampling) or task.request.constraint is not None


@dataclass
class Lookup:
    """Guesses for requests.

    Args:
        most: tokens guessed at once; 0: never any.
    """

    most: int

    def ask(self, task: Task) -> list[int]:
        """Guesses for a request, fewer than it may draw yet; none while they are in vain.

        A request whose penalties change with every token gets none, nor does one that may not draw every token.
        """
        if not self.most or len(task.tokens) < task.guess_from or changes(task):
            return []
        return guessed(task.tokens, min(self.most, task.room - 1))

    def tell(self, task: Task, guesses: int, drawn: int) -> None:
        """Learn how many tokens a request drew in a call that it had so many guesses for."""
        if not guesses:
            return
        least, largest = _PATIENCE
        task.patience = 0 if drawn > 1 else min(max(2 * task.patience, least), largest)
        task.guess_from = len(task.tokens) + task.patience
