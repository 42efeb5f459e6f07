"""What CUDA's stand-in in XLA writes to stderr where no driver is: nothing that a user of a plan could act on.

It is written by C++ while libraries are loaded, before any level of logging can be set.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_NOTICE = re.compile(
    rb"(?:^WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR\n)?"
    rb"^I\d{4} .* cudart_stub\.cc:\d+\] Could not find cuda drivers on your machine, GPU will not be used\.\n",
    re.MULTILINE,
)


@contextlib.contextmanager
def without_cuda_notices() -> Iterator[None]:
    """Leave these notices out of what is written to stderr inside; all else of it comes at the end."""
    sys.stderr.flush()
    stderr = os.dup(2)
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
