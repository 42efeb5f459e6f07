"""The engine's programs, all compiled before the first request: a dozen shapes, by several threads."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring

from cramjax.compiling import device_options

_COMPILED = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    global _count
    _count += event == _COMPILED


@functools.cache
def _listening() -> None:
    jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations() -> int:
    """Programs that this process has compiled since it first asked."""
    _listening()
    return _count


def compile_all(
    programs: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]], donate: tuple[int, ...]
) -> dict[Any, Callable[..., Any]]:
    """Compile functions for the shapes of their arguments, side by side.

    Args:
        programs: for each name a function and its arguments, or their shapes.
        donate: which arguments are donated.
    """
    options = device_options(jax.local_devices()[0], "1steps")

    def compiled(item: tuple[Any, tuple[Callable[..., Any], tuple[Any, ...]]]) -> tuple[Any, Callable[..., Any]]:
        name, (function, arguments) = item
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        return name, jax.jit(function, donate_argnums=donate, compiler_options=options).lower(*shapes).compile()

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return dict(threads.map(compiled, programs.items()))
