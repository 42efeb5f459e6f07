"""A stream that is always behind: races that a fast machine hides are seen every time."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any


class Late(Executor):
    """Does nothing until somebody waits for it, and then only what was submitted up to there, in order."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep a call for later."""
        future = _Later(self)
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        return future


class _Later(Future[Any]):
    def __init__(self, executor: Late):
        super().__init__()
        self._executor = executor

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            future, call = self._executor.waiting.popleft()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        return super().result(timeout)
