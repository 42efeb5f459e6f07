"""What the commands share: a parser whose mistakes are the user's, and the files that they write."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from cramjax.errors import ConfigError, RunError
from cramjax.show.values import Viewed


class Parser(argparse.ArgumentParser):
    """Argparse that raises a `ConfigError` where it would leave the process."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raise the mistake in the command line."""
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


def require_directories(files: Mapping[str, str | None]) -> None:
    """Refuse files that could not be written, before what takes time.

    Args:
        files: paths by the option that gives each; None where it is not given.

    Raises:
        RunError: a file's directory does not exist, or the file is a directory.
    """
    for option, file in files.items():
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise RunError(f"cannot write {file}: there is no such directory. Give another file to {option}.")
        if file is not None and Path(file).is_dir():
            raise RunError(f"cannot write {file}: it is a directory. Give a file to {option}.")


def print_value(value: Viewed) -> None:
    """Print a value: as wide as a terminal is; where there is none, as wide as its tables need to be."""
    from rich.console import Console

    console = Console()
    console.print(value) if console.is_terminal else print(value)


def require_picture(file: str | None) -> None:
    """Refuse a file that no figure is written as.

    Args:
        file: what `--plot` gives; None: nothing.

    Raises:
        ConfigError: its ending is of no format.
    """
    if file is not None and Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot must be a .png, .svg or .pdf file, got {file!r}.")


def write_json(path: str, content: object) -> None:
    """Write what `--json` asks for.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Give another file to --json.") from None
