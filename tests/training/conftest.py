"""Tiny runs: a model of a few thousand parameters on the tiny corpus, a fraction of a second a run once compiled."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cramjax.config import RunConfig
from cramjax.recipes import load_recipe, override

TINY: dict[str, Any] = {
    "budget": "24steps",
    "data.sequence_length": 32,
    "data.validation_fraction": 0.2,
    "tokenizer.vocab_size": 300,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp": 64,
    "batch.size": 8,
    "batch.microbatch": 8,
    "evaluate.points": 3,
    "evaluate.tokens": 1024,
    "evaluate.batch": 8,
    "checkpoint.points": 4,
    "train.data_parallel": 1,
    "train.compute_dtype": "float32",  # what `auto` is depends on the machine
    "train.log_points": 12,
}


def configuration(corpus: Path, recipe: str = "quickstart", **overrides: Any) -> RunConfig:
    """A tiny run on a corpus; keyword `a__b` overrides field `a.b`."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    values: dict[str, Any] = {"data.source": str(corpus / "*.txt"), **TINY, **named}
    if recipe == "crammed-bert":
        values["data.max_tokens_per_char"] = 0.4  # a vocabulary of 300 compresses little
        if "batch.microbatch" not in named:  # its batch is ramped up from one microbatch
            values["batch.microbatch"] = 4
    start_from = values.pop("start_from", None)
    config = load_recipe(recipe, values)
    # Its architecture, which would be refused if it were asked for, gives way to that of a model it starts from.
    return config if start_from is None else override(config, {"start_from": start_from})


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache_directory: Path) -> Callable[..., RunConfig]:
    """Make the configuration of a tiny run: causal unless told otherwise; keyword `a__b` overrides field `a.b`."""
    return functools.partial(configuration, corpus)
