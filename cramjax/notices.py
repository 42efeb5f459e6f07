"""What CUDA's stand-in in XLA writes to stderr where no driver is: nothing that a user of a plan could act on.

It is written by C++ while libraries are loaded, some of them by `import jax` itself (0.10.2), before any level of
logging can be set.
"""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CARDS = ("/dev/nvidia0", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
"""Where an NVIDIA card shows itself: on Linux, in containers, in WSL 2."""

_NOTICE = re.compile(
    rb"(?:^WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR\n)?"
    rb"^I\d{4} .* cudart_stub\.cc:\d+\] Could not find cuda drivers on your machine, GPU will not be used\.\n",
    re.MULTILINE,
)


@contextlib.contextmanager
def without_cuda_notices() -> Iterator[None]:
    """Leave these notices out of what is written to stderr inside; all else of it comes at the end.

    A process whose stderr is closed has nothing to leave out of.
    """
    import tempfile  # here, because every start of `cramjax` comes by, and few need it

    stderr = _duplicated_stderr()
    if stderr is None:
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            if rest := _NOTICE.sub(b"", caught.read()):
                os.write(2, rest)


def _duplicated_stderr() -> int | None:
    if sys.stderr is None:  # it was closed when Python started: the number 2 may be another file's since
        return None
    try:
        return os.dup(2)
    except OSError:
        return None


def nvidia_card() -> bool:
    """Whether this computer shows an NVIDIA card, which may or may not be usable."""
    return any(map(os.path.exists, _CARDS))


def import_jax_quietly() -> None:
    """Have whoever first imports jax in this process do so without these notices, if there is no card."""
    if "jax" not in sys.modules:
        sys.meta_path.insert(0, _QuietJax())


class _QuietJax(MetaPathFinder):
    """Finds jax, once, as it would be found anyway."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's specification, if it is jax."""
        if fullname != "jax":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None and not nvidia_card():
            load = spec.loader.exec_module

            def quietly(module: ModuleType) -> None:
                with without_cuda_notices():
                    load(module)

            spec.loader.exec_module = quietly
        return spec
