"""Only CUDA's notices are left out of stderr."""

import os
import subprocess
import sys

import pytest

from cramjax.notices import without_cuda_notices

_HEAD = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
_CUDA = (
    "I0000 00:00:1795593949.554410   21598 cudart_stub.cc:31] Could not find cuda drivers on your machine, "
    "GPU will not be used.\n"
)
_OTHER = "E0000 00:00:1795593949.554410   21598 other.cc:31] Something else\n"


def test_all_else_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), without_cuda_notices():
        for text in (_HEAD, _CUDA, "mine\n", _CUDA, _HEAD, _OTHER):
            os.write(2, text.encode())
        raise ValueError("wrong")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "mine\n" + _HEAD + _OTHER + "after\n"


_IMPORT = "import cramjax, jax"
_CLOSED_LATER = (
    "import os; os.close(2); from cramjax.notices import without_cuda_notices as n\nwith n(): print('inside')"
)


def test_a_closed_stderr_is_no_mistake() -> None:
    closed = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable]
    assert subprocess.run([*closed, _IMPORT], stdout=subprocess.DEVNULL).returncode == 0
    done = subprocess.run([sys.executable, "-c", _CLOSED_LATER], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "inside\n"
