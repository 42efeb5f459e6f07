"""Errors whose message is for the user: one clear sentence or two, no traceback, exit code 2."""


class UserError(Exception):
    """A mistake in what the user gave.

    The message states the value got, the values allowed, and what to do next. The command line prints it and exits
    with code 2; in Python it is an ordinary exception.
    """


class ConfigError(UserError):
    """A configuration that cannot be: unknown key, wrong type, impossible combination."""


class DataError(UserError):
    """A corpus, tokenizer or prepared data set that cannot be used."""


class RunError(UserError):
    """A run directory or checkpoint that cannot be used as asked."""


class ModelError(UserError):
    """A model, ours or of others, that cannot be read, written or used as asked."""


class OutOfMemoryError(RunError):
    """The device's memory was not enough for the first step; no step has been taken."""


class RunInterruptedError(Exception):
    """A run was told to stop by a signal, and has saved itself; the message says how to resume it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
