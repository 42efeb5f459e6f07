"""Small language models with tokenizers, for the tests of model directories, import and export."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

import cramjax
from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.tokenizer import train_tokenizer
from cramjax.language_model import LanguageModel
from cramjax.model import make_model

from . import models

TEXT = ["the stack walks block by block, and every token pays for its own place in the budget. " * 20]
SMALL = {"layers": 2, "width": 32, "heads": 2, "mlp": 64, "init_std": 0.15}

MakeModel = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A BPE of 300 tokens."""
    return train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXT)


@pytest.fixture(scope="session")
def model_of(words: Tokenizer) -> MakeModel:
    """Makes a model with random weights, its norms and biases too."""

    def make(kind: Any = "causal", context: int = 32, param_dtype: Any = "float32", **model: Any) -> LanguageModel:
        built = make_model(
            ModelConfig(**{**SMALL, **model}),
            vocab_size=words.vocab_size,
            sequence_length=context,
            causal=kind == "causal",
            separator_id=words.separator_id,
            param_dtype=param_dtype,
        )
        params, keys = built.init(jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 100))
        params = jax.tree.map(lambda p: (p + 0.1 * jax.random.normal(next(keys), p.shape)).astype(p.dtype), params)
        return LanguageModel("a-model", kind, words, context, built, params)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """A tiny model of `transformers`, as ours."""
    from .test_import import tokenizer_files  # here, for it needs `transformers`

    made: dict[str, LanguageModel] = {}

    def model(kind: str) -> LanguageModel:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            their = models.seeded(kind.removesuffix("-encoder"))
            (their.bert if kind.endswith("-encoder") else their).save_pretrained(path)
            tokenizer_files(path, sep_token="w2", mask_token="w4")
            made[kind] = cramjax.import_model(path)
        return made[kind]

    return model
