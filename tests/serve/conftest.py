"""Small untrained runs for the tests of serving."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TokenizerConfig
from cramjax.data.tokenizer import train_tokenizer
from cramjax.training import Run
from cramjax.training.parts import build_model

TEXT = ["the stack walks block by block, and every token pays for its own place in the budget. " * 20]

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def run_of() -> MakeRun:
    """Makes a run with random weights, large enough that its predictions differ from token to token."""
    words = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXT)

    def make(kind: Any = "causal", sequence_length: int = 16, seed: int = 0, **model: Any) -> Run:
        config = replace(
            RunConfig(),
            data=DataConfig(sequence_length=sequence_length),
            model=ModelConfig(layers=2, width=32, heads=2, mlp=64, init_std=0.3, **model),
            objective=ObjectiveConfig(kind=kind),
        )
        built = build_model(config, words)
        return Run(Path("some-run"), config, words, built, built.init(jax.random.key(seed)), {})

    return make
