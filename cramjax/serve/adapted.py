"""A model with several adapters beside it: an engine for each, which share its weights and take turns."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from cramjax.errors import ConfigError, ModelError
from cramjax.formats.peft import read_adapter
from cramjax.language_model import LanguageModel
from cramjax.model.stack import virtual_tokens
from cramjax.serve.engine import Engine, Load
from cramjax.serve.request import Progress, Request
from cramjax.serving import EngineConfig


def with_adapters(model: LanguageModel, directories: Mapping[str, str | Path]) -> dict[str, LanguageModel]:
    """A model with each of some adapters; its own weights are there once.

    Args:
        model: as it is served, without adapters.
        directories: of peft's adapters, by the names that they are served by.

    Raises:
        ModelError: one is of another model, or cannot be read, or is no change of weights.
    """
    made = {}
    for name, directory in directories.items():
        try:
            params = read_adapter(directory, model)
        except ModelError as error:
            raise ModelError(f"the adapter {name} cannot be served beside {model.path}: {error}") from None
        if virtual_tokens(params):
            raise ModelError(f"the adapter {name} is virtual tokens: serve {model.path} with it alone, as a run.")
        made[name] = replace(model, params=params)
    return made


class AdaptedEngine:
    """An engine for a model and one for each adapter. Each has slots and pages of its own."""

    def __init__(self, model: LanguageModel, adapted: Mapping[str, LanguageModel], config: EngineConfig):
        """Compile all programs of all of them; see `Engine`.

        Args:
            model: without adapters.
            adapted: with each, from `with_adapters`.
            config: of each engine.
        """
        models: dict[str | None, LanguageModel] = {None: model, **adapted}
        self._engines = {name: Engine(own, config).prepare() for name, own in models.items()}
        for engine in self._engines.values():
            engine.expect_no_more()  # the later ones compiled after the first one was ready
        self.context, self.vocab_size = self._engines[None].context, self._engines[None].vocab_size
        self._numbers: dict[int, tuple[Engine, int]] = {}
        self._next = 0

    def add(self, request: Request, listener: Callable[[Progress], None]) -> int:
        """Let a request wait for its turn, with its adapter.

        Returns:
            Its number, for `cancel`.

        Raises:
            ConfigError: as of `Engine.add`; or there is no such adapter.
        """
        if request.adapter not in self._engines:
            raise ConfigError(f"there is no adapter {request.adapter!r} here: {', '.join(map(str, self._engines))}.")
        self._next += 1
        engine, number = self._engines[request.adapter], self._next

        def heard(progress: Progress) -> None:
            if progress.reason is not None:
                self._numbers.pop(number, None)
            listener(progress)

        self._numbers[number] = engine, engine.add(request, heard)
        return number

    def cancel(self, number: int) -> None:
        """End a request; one that has ended is left alone."""
        if (found := self._numbers.get(number)) is not None:
            found[0].cancel(found[1])

    def step(self) -> bool:
        """One round of each engine.

        Returns:
            Whether there was anything to do.
        """
        return any([engine.step() for engine in self._engines.values()])

    def load(self) -> Load:
        """What all of them together hold and have done."""
        first, *others = (engine.load() for engine in self._engines.values())
        # What was compiled is counted for the process, so that each says the same.
        names = [each.name for each in fields(first) if each.name != "compilations"]
        return replace(first, **{name: sum(getattr(load, name) for load in (first, *others)) for name in names})
