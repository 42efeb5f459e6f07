"""Small language models with random weights, and a text to calibrate them on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.tokenizer import train_tokenizer
from cramjax.language_model import LanguageModel
from cramjax.model import make_model

SMALL = {"layers": 3, "width": 32, "heads": 2, "mlp": 64, "init_std": 0.15, "activation": "swiglu"}

MakeModel = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def words(corpus: Path) -> Tokenizer:
    """A BPE of 300 tokens."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.glob("*.txt"))]
    return train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), texts)


@pytest.fixture(scope="session")
def model_of(words: Tokenizer) -> MakeModel:
    """Makes a model with random weights, its norms and biases too."""

    def make(kind: Any = "causal", context: int = 32, dtype: Any = "float32", **model: Any) -> LanguageModel:
        built = make_model(
            ModelConfig(**{**SMALL, **model}),
            vocab_size=words.vocab_size,
            sequence_length=context,
            causal=kind == "causal",
            separator_id=words.separator_id,
            param_dtype=dtype,
            compute_dtype=dtype,
        )
        params, keys = built.init(jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 100))
        params = jax.tree.map(lambda p: (p + 0.05 * jax.random.normal(next(keys), p.shape)).astype(p.dtype), params)
        return LanguageModel(Path("a-model"), kind, words, context, built, params)

    return make


@pytest.fixture(scope="session")
def text(corpus: Path) -> str:
    """What models are calibrated on."""
    return str(corpus / "0*.txt")


@pytest.fixture(scope="session")
def held_out(corpus: Path) -> str:
    """What they are scored on."""
    return str(corpus / "3*.txt")
