"""A chromium without a window, driven through its own protocol over a pipe."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--remote-debugging-pipe",
    "about:blank",
)
_SECONDS = 120.0
"""That the browser gets for anything: slow machines start it beside other tests."""


class Browser:
    """One page."""

    def __init__(self, commands: int, answers: int):
        """Talk through two pipes."""
        self._commands, self._answers = commands, answers
        self._number, self._buffer, self._session = 0, b"", None
        self.mistakes: list[str] = []
        """What the page threw, and what its console was told as an error."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """What a method of the protocol gives."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(asked | session).encode() + b"\0")
        while (message := self._next()).get("id") != self._number:
            if message.get("method") == "Runtime.exceptionThrown":
                self.mistakes.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.mistakes.append(message["params"]["entry"]["text"])
        assert "error" not in message, message
        return message["result"]

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """What an expression is, once it is something."""
        end = time.monotonic() + _SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (
                f"{expression} did not become true; the page: {self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def click(self, name: str) -> None:
        """Click an element by its id, with a mouse."""
        x, y = self.value(
            f"(() => {{ const own = document.getElementById('{name}'); own.scrollIntoView({{block: 'center'}});"
            " const r = own.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, name: str, text: str) -> None:
        """Write into an element by its id, instead of what is there."""
        self.value(f"document.getElementById('{name}').focus(); document.getElementById('{name}').select()")
        self.call("Input.insertText", text=text)

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], _SECONDS)[0], f"the browser said nothing for {_SECONDS:g} s"
            read = os.read(self._answers, 1 << 16)
            assert read, "the browser has ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _starts(path: str) -> bool:
    """Whether it is a browser, and not a script that tells where to get one."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A browser whose profile is in a directory; skips the test where there is none."""
    path = next((found for name in _NAMES if (found := shutil.which(name)) and _starts(found)), None)
    if path is None:
        pytest.skip("no browser here: install chromium (Debian: apt-get install chromium)")
    their_commands, commands = os.pipe()
    answers, their_answers = os.pipe()
    script = f'exec "$@" 3<&{their_commands} 4>&{their_answers}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", path, f"--user-data-dir={directory}", *_OPTIONS],
        pass_fds=(their_commands, their_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_commands)
    os.close(their_answers)
    try:
        yield Browser(commands, answers)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)
