"""Small models with random weights: of our own, and a Llama with its tokenizer as `transformers` saves them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import pytest

import cramjax
from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data import Tokenizer
from cramjax.data.tokenizer import train_tokenizer
from cramjax.evaluation.made import agreement, reference, sums
from cramjax.language_model import LanguageModel
from cramjax.model import make_model

from .helpers import MakeModel, WriteTask, write_rows

SMALL = {"layers": 2, "width": 32, "heads": 2, "mlp": 64, "init_std": 0.3}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_text() -> list[str]:
    """Some English to train a tokenizer on."""
    return [row["good"] for row in agreement()] + [row["text"][:500] for row in reference()]


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A BPE of 400 tokens."""
    return train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=400), made_text())


@pytest.fixture(scope="session")
def model_of(words: Tokenizer) -> MakeModel:
    """Makes a model with random weights, large enough that its predictions differ from token to token."""

    def make(kind: Any = "causal", context: int = 64, seed: int = 0, **model: Any) -> LanguageModel:
        built = make_model(
            ModelConfig(**{**SMALL, **model}),
            vocab_size=words.vocab_size,
            sequence_length=context,
            causal=kind == "causal",
            separator_id=words.separator_id,
        )
        params = built.init(jax.random.key(seed))
        return LanguageModel(Path("a-model"), kind, words, context, built, params)

    return make


@pytest.fixture(scope="session")
def causal(model_of: MakeModel) -> LanguageModel:
    """A causal model."""
    return model_of()


@pytest.fixture(scope="session")
def masked(model_of: MakeModel) -> LanguageModel:
    """A masked model."""
    return model_of(kind="masked")


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes a task's YAML, and its rows beside it as JSON lines."""

    def write(yaml: str, rows: Iterable[Any] | None = None, name: str = "task") -> Path:
        if rows is not None:
            write_rows(tmp_path / f"{name}.jsonl", rows)
            yaml = f"data: {name}.jsonl\n{yaml}"
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml, encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `transformers`: a random Llama whose tokenizer puts `<s>` before a text, and a chat template."""
    transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
    torch = pytest.importorskip("torch", reason="needs the `parity` extra")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*made_text(), *(f"{row['a']} + {row['b']}" for row in sums())], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("llama")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        **{"vocab_size": 500, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "rms_norm_eps": 1e-5},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def imported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a model directory."""
    path = tmp_path_factory.mktemp("imported") / "llama"
    cramjax.import_model(llama, path)
    return path
