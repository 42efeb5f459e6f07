"""`model.yaml`: what a model is, beside its weights and its vocabulary. Imports no jax."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cramjax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TokenizerConfig, TrainConfig
from cramjax.embeddings import EmbeddingConfig
from cramjax.errors import ModelError
from cramjax.loading import Overrides, dump, from_yaml, read_mapping
from cramjax.ranges import Count, InnerShare, Natural
from cramjax.recipes import override, validate

Kind = Literal["causal", "masked", "encoder", "labels", "causal_labels"]
"""What a model predicts: the next token, hidden tokens, nothing (an encoder without a head), or labels of texts, by the
first token or in a causal model by the last."""

FILE = "model.yaml"
FORMAT = 1
"""Version of model directories."""
_NEEDED = ("kind", "vocab_size", "context", "separator_id", "pad_id", "architecture")


@dataclass(frozen=True)
class Description:
    """The contents of `model.yaml`."""

    format: int = FORMAT
    """Version of the directory."""
    kind: Kind = "causal"
    """What the model predicts."""
    vocab_size: Count = 1
    """Rows of the vocabulary, without padding."""
    context: Count = 1
    """Tokens that the model can see."""
    normalize: Literal["none", "nfc", "nfkc", "ascii_lower"] = "none"
    """How text was normalised before it became tokens; see `DataConfig.normalize`."""
    mask_rate: InnerShare = 0.15
    """Share of tokens hidden when a masked model is scored."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of activations and matrix products."""
    separator_id: Natural = 0
    """Token that separates documents."""
    mask_id: Natural | None = None
    """Token that hides another."""
    pad_id: Natural = 0
    """Token that fills up short rows."""
    begin_ids: tuple[int, ...] | None = None
    """Tokens before a text. null: the separator."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text, beside the separator."""
    embedding: EmbeddingConfig | None = None
    """How texts become vectors. null: not said; see `cramjax.serve.embed`."""
    architecture: ModelConfig = field(default_factory=ModelConfig)
    """The blocks and what is around them."""

    def run_config(self) -> RunConfig:
        """A run of this architecture on sequences as long as its context; its weights are trained in float32."""
        kind = "masked" if self.kind == "encoder" else self.kind
        return RunConfig(
            data=DataConfig(sequence_length=self.context, normalize=self.normalize),
            tokenizer=TokenizerConfig(vocab_size=max(self.vocab_size, 258)),
            model=self.architecture,
            objective=ObjectiveConfig(kind=kind, mask_rate=self.mask_rate),
            train=TrainConfig(compute_dtype=self.compute_dtype),
        )


def kind_of(config: RunConfig) -> Kind:
    """What the model of a run predicts."""
    objective = config.objective
    if objective.kind in ("labels", "causal_labels"):
        return objective.kind
    return "causal" if objective.causal else "masked"


def is_model_directory(path: str | Path) -> bool:
    """Whether a path is a model directory."""
    return (Path(path).expanduser() / FILE).is_file()


def write_description(path: Path, description: Description) -> None:
    """Write `model.yaml` into a directory."""
    (path / FILE).write_text(dump(description), encoding="utf-8")


def read_description(path: str | Path) -> Description:
    """Read the `model.yaml` of a model directory.

    Raises:
        UserError: there is none, it is of a later version, or says what cannot be.
    """
    path = Path(path).expanduser()
    file = path / FILE
    if not file.is_file():
        what = "has no model.yaml" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise ModelError(f"{path} is not a model directory (it {what}): give one that `cramjax import` made.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{file} is not text: copy the model again, or make it again.") from None
    given = read_mapping(text, str(file))
    version = given.get("format")
    if version != FORMAT:
        raise ModelError(f"{file} is of format {version!r}, and this version reads {FORMAT}: upgrade cramjax.")
    for key in _NEEDED:
        if key not in given:
            raise ModelError(f"{file} has no {key}: copy the model again, or make it again.")
    description = from_yaml(Description, text, str(file))
    validate(description.run_config())
    return description


def model_config(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """A run of a model directory's architecture on a vocabulary of its size, to plan it.

    Args:
        path: the model directory.
        overrides: as for `cramjax.recipes.load_recipe`.

    Raises:
        UserError: it is no model directory, or a field is unknown or impossible.
    """
    return override(read_description(path).run_config(), overrides)
