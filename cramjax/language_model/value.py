"""A language model as one value: weights, the functions that use them, vocabulary, and where it came from."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtyping import PyTree

from cramjax.config import ModelConfig
from cramjax.data import Tokenizer
from cramjax.embeddings import EmbeddingConfig
from cramjax.errors import RunError
from cramjax.model import Model, count_parameters
from cramjax.model_yaml import Kind

Format = Literal["hf", "gguf", "peft", "compressed-tensors", "gptq"]
"""What a model is written as for other libraries."""


@dataclass(frozen=True, repr=False)
class LanguageModel:
    """A model that can be used: from a run, from a model directory, or from another library's files."""

    path: Path
    """Where it was read from."""
    kind: Kind
    """What it predicts: the next token, hidden tokens, or nothing (an encoder without a head)."""
    tokenizer: Tokenizer
    context: int
    """Tokens that it can see."""
    model: Model
    params: PyTree
    normalize: str = "none"
    """How text was normalised before it became tokens; see `DataConfig.normalize`."""
    mask_rate: float = 0.15
    """Share of tokens hidden when a masked model is scored."""
    chat_template: str | None = None
    """Jinja template that makes a prompt of a conversation."""
    embedding: EmbeddingConfig | None = None
    """How it makes one vector of a text, where it says so."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from, what was done to it, its scores."""

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""
        return self.model.config

    @property
    def parameters(self) -> int:
        """How many, the padding of the vocabulary included."""
        return count_parameters(self.config, self.model.vocab_size, self.model.sequence_length).total

    def require_tokens(self) -> None:
        """Refuse a model whose head gives labels, where tokens are to be predicted.

        Raises:
            RunError: it is one.
        """
        if self.config.classifier is not None:
            names = ", ".join(self.config.classifier.labels[:10]) or "a number"
            raise RunError(
                f"{self.path} gives labels ({names}), not tokens: score it with `cramjax evaluate {self.path} --labels "
                "FILE`, or give the model that it was tuned from."
            )

    def save(self, out: str | Path) -> Path:
        """Write it as a model directory.

        Args:
            out: the directory to make.

        Raises:
            ModelError: it exists, or cannot be written.
        """
        from cramjax.language_model.directory import save_model

        return save_model(self, out)

    def export(self, out: str | Path, format: Format = "hf", *, dequantise: bool = False) -> Path:
        """Write it for other libraries, where they have a class that computes exactly this model.

        Args:
            out: the directory to make (hf), or the file (gguf).
            format: `hf`: a directory that `transformers` loads; `gguf`: a file for llama.cpp (Llama's family), with the
                codes of a quantised model; `peft`: the adapter alone; `compressed-tensors` and `gptq`: a directory of a
                quantised model, with its codes.
            dequantise: write packed matrices as floating point numbers (hf and gguf).

        Raises:
            ModelError: no class computes it, or the output exists or cannot be written.
        """
        from cramjax.language_model.exchange import export_model

        return export_model(self, out, format, dequantise=dequantise)

    def __repr__(self) -> str:
        return (
            f"LanguageModel({str(self.path)!r}: {self.kind}, {self.parameters:,} parameters, {self.config.layers} "
            f"layers, width {self.config.width}, vocabulary {self.model.vocab_size:,}, context {self.context:,})"
        )

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"
