"""Only CUDA's notices are left out of stderr."""

import os

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
