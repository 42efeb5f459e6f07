"""`cramjax serve`: a model behind an OpenAI-compatible HTTP interface."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from jsonargparse import ArgumentParser

from cramjax import loading
from cramjax.errors import ConfigError
from cramjax.server import ServeConfig

_NEEDS = ("starlette", "uvicorn", "prometheus_client", "llguidance")


def serve(words: Sequence[str]) -> None:
    """Serve a model until a signal ends it."""
    parser = ArgumentParser(
        prog="cramjax serve",
        usage="cramjax serve MODEL [--port 8000] [--api_key KEY] [--engine.FIELD=VALUE …]",
        description="Serve a model (a run or a model directory) over HTTP, as clients of OpenAI's interface expect it: "
        "/v1/completions, /v1/chat/completions (or, of an encoder, /v1/embeddings), /v1/models, /tokenize, /health, "
        "/metrics, and a page to try it at /. /openapi.json describes them. Needs the extra `serve`.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="A run directory or a model directory."
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default=argparse.SUPPRESS,
        help="Of a run: the newest weights, or those with the lowest held-out bits per byte (default: latest).",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Answer each request as if it were alone: short for --engine.deterministic=true.",
    )
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help="A smaller model with the same tokenizer, that guesses tokens: short for --engine.draft.",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME=DIR",
        action="append",
        default=argparse.SUPPRESS,
        help="An adapter of peft's, that clients ask for by name (repeatable). Each has slots and pages of its own.",
    )
    loading.add_options(parser, ServeConfig)
    given = loading.parse_arguments(parser, ServeConfig, words).as_dict()
    model, checkpoint = given.pop("model", None), given.pop("checkpoint", "latest")
    if model is None:
        raise ConfigError("cramjax serve needs a model: a run directory or a model directory.")
    if given.pop("deterministic", False):
        given.setdefault("engine", {})["deterministic"] = True
    if (draft := given.pop("draft", None)) is not None:
        given.setdefault("engine", {})["draft"] = draft
    adapters = _adapters(given.pop("adapter", None) or [])
    config = loading.from_mapping(ServeConfig, given)
    if config.api_key is None and os.environ.get("CRAMJAX_API_KEY"):
        config = replace(config, api_key=os.environ["CRAMJAX_API_KEY"])
    if config.api_key is not None and not config.api_key.strip():
        raise ConfigError("--api_key must not be empty: leave it out to serve everybody.")
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        raise ConfigError(
            f"cramjax serve needs {', '.join(missing)}, not installed here: pip install 'cramjax[serve]'."
        )
    _serve(str(model), checkpoint, config, adapters)


def _adapters(words: Sequence[str]) -> dict[str, str]:
    """Directories of adapters, by their names."""
    adapters: dict[str, str] = {}
    for word in words:
        name, _, directory = word.partition("=")
        if not name or not directory:
            raise ConfigError(f"--adapter must be NAME=DIR, got {word!r}.")
        if name in adapters:
            raise ConfigError(f"--adapter {name} is given twice: each needs a name of its own.")
        adapters[name] = directory
    return adapters


def _serve(path: str, checkpoint: str, config: ServeConfig, adapters: Mapping[str, str]) -> None:
    from cramjax.serve.adapted import AdaptedEngine, with_adapters
    from cramjax.serve.decoding import for_decoding
    from cramjax.serve.embedder import Embedder, is_embedder
    from cramjax.serve.engine import Engine
    from cramjax.serve.engine.draft import draft_model
    from cramjax.serve.http.run import listen, run_server
    from cramjax.serve.http.worker import ServedEngine
    from cramjax.serve.lengths.triggers import Lazy
    from cramjax.training.given import language_model, load

    with listen(config) as listening:
        model = language_model(load(path, "best" if checkpoint == "best" else "latest"))
        if is_embedder(model):
            if config.weights != "auto":
                raise ConfigError(f"{path} makes embeddings, of weights as they are: leave --weights out.")
            if adapters:
                raise ConfigError(f"{path} makes embeddings, for which no adapters are served: merge one into it.")
            trigger = Lazy(config.engine.patience) if config.engine.patience else None
            engine: ServedEngine = Embedder(model, alone=config.engine.deterministic, trigger=trigger)
        elif adapters:
            if config.engine.draft is not None:
                raise ConfigError("draft must be null with adapters: it guesses for the model without them.")
            model = for_decoding(model, config.weights)
            engine = AdaptedEngine(model, with_adapters(model, adapters), config.engine)
        else:
            model = for_decoding(model, config.weights)
            draft = draft_model(config.engine.draft, config.weights)
            engine = Engine(model, config.engine, draft=draft).prepare()
        run_server(model, engine, config, listening, _tell, tuple(adapters))


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
