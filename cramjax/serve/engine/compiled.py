"""The engine's programs: compiled before the first request, by several threads, or each when it is first needed."""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring

from cramjax.compiling import device_options

Name = tuple[Any, ...]
"""What a program does, and the shape that it does it in."""

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


@functools.cache
def program(function: Callable[..., Any], *static: Any) -> Any:
    """A function of the engine as a program: the same one for all engines that ask for the same.

    Args:
        function: of what is static, parameters, what is donated, and more.
        static: its first arguments.
    """
    options = device_options(jax.local_devices()[0], "1steps")
    return jax.jit(functools.partial(function, *static), donate_argnums=(1,), compiler_options=options)


class Programs:
    """Programs by what they do and by their shapes."""

    def __init__(self, functions: Mapping[str, Any]):
        """Compile nothing yet.

        Args:
            functions: from `program`, by the first word of the names.
        """
        self._functions = functions
        self._compiled: dict[Name, Callable[..., Any]] = {}

    def compile(self, arguments: Mapping[Name, tuple[Any, ...]]) -> None:
        """Compile programs side by side.

        Args:
            arguments: of each, or their shapes.
        """

        def compiled(item: tuple[Name, tuple[Any, ...]]) -> tuple[Name, Callable[..., Any]]:
            name, own = item
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), own)
            return name, self._functions[name[0]].lower(*shapes).compile()

        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            self._compiled.update(threads.map(compiled, arguments.items()))

    def __getitem__(self, name: Name) -> Callable[..., Any]:
        """What to call; where it is not compiled, its first call does that."""
        return self._compiled.get(name) or self._functions[name[0]]
