"""Where trials run. An engine takes names of trials and yields each when its process has ended, however it ended.

What came of a trial is in its directory; engines carry no results.
"""

from collections.abc import Callable, Iterator, Sequence

RunEngine = Callable[[Sequence[str], Callable[[], bool], Callable[[Sequence[str]], None]], Iterator[str]]
"""Takes names of trials, whether to stop, and what to call with the names of running ones; yields those that ended."""
