"""`model.yaml`: what a model is, beside its weights and its vocabulary. Imports no jax."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from cramjax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TokenizerConfig, TrainConfig
from cramjax.errors import ModelError
from cramjax.loading import read_mapping
from cramjax.recipes import from_yaml, override, validate

Kind = Literal["causal", "masked", "encoder"]
"""What a model predicts: the next token, hidden tokens, or nothing (an encoder without a head)."""

FILE = "model.yaml"
FORMAT = 1
"""Version of model directories."""


@dataclass(frozen=True)
class Description:
    """The contents of `model.yaml`."""

    architecture: ModelConfig
    vocab_size: int
    """Rows of the vocabulary, without padding."""
    context: int
    """Tokens that the model can see."""
    kind: Kind
    normalize: str = "none"
    """How text was normalised before it became tokens; see `DataConfig.normalize`."""
    mask_rate: float = 0.15
    """Share of tokens hidden when a masked model is scored."""
    param_dtype: str = "float32"
    """Precision of the weights."""
    compute_dtype: str = "float32"
    """Precision of activations and matrix products."""
    separator_id: int = 0
    mask_id: int | None = None
    pad_id: int = 0
    begin_ids: tuple[int, ...] | None = None
    """Tokens before a text; null: the separator."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text, beside the separator."""

    def run_config(self) -> RunConfig:
        """A run of this architecture on sequences as long as its context."""
        return RunConfig(
            data=DataConfig(sequence_length=self.context, normalize=self.normalize),  # pyright: ignore[reportArgumentType]
            tokenizer=TokenizerConfig(vocab_size=max(self.vocab_size, 258)),
            model=self.architecture,
            objective=ObjectiveConfig(kind="causal" if self.kind == "causal" else "masked", mask_rate=self.mask_rate),
            train=TrainConfig(param_dtype=self.param_dtype, compute_dtype=self.compute_dtype),  # pyright: ignore[reportArgumentType]
        )


def is_model_directory(path: str | Path) -> bool:
    """Whether a path is a model directory."""
    return (Path(path).expanduser() / FILE).is_file()


def write_description(path: Path, description: Description) -> None:
    """Write `model.yaml` into a directory."""
    values = {"format": FORMAT, **asdict(description)}
    values["architecture"] = values.pop("architecture")  # last, as it is long
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    (path / FILE).write_text(text, encoding="utf-8")


def read_description(path: str | Path) -> Description:
    """Read the `model.yaml` of a model directory.

    Raises:
        ModelError: there is none, it is of a later version, or says what cannot be.
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
    values = dict(read_mapping(text, str(file)))
    version = values.pop("format", None)
    if version != FORMAT:
        raise ModelError(f"{file} is of format {version!r}, and this version reads {FORMAT}: upgrade cramjax.")
    architecture = values.pop("architecture", {})
    known = {field: get for field, get in Description.__dataclass_fields__.items() if field != "architecture"}
    if strange := [key for key in values if key not in known]:
        raise ModelError(f"{file} has the unknown key {strange[0]!r}. Keys: {', '.join(known)}.")
    for key in ("vocab_size", "context", "separator_id", "pad_id"):
        if type(values.get(key)) is not int or values[key] < (key in ("vocab_size", "context")):
            raise ModelError(f"{file}: {key} must be a whole number, got {values.get(key)!r}.")
    if values.get("kind") not in get_args(Kind):
        raise ModelError(f"{file}: kind must be one of {', '.join(get_args(Kind))}, got {values.get('kind')!r}.")
    sections: dict[str, Any] = {"model": architecture, "data": {"sequence_length": values["context"]}}
    if "normalize" in values:
        sections["data"]["normalize"] = values["normalize"]
    sections["objective"] = {"kind": "causal" if values["kind"] == "causal" else "masked"}
    sections["train"] = {key: values[key] for key in ("param_dtype", "compute_dtype") if key in values}
    if "mask_rate" in values:
        sections["objective"]["mask_rate"] = values["mask_rate"]
    config = from_yaml(yaml.safe_dump(sections), str(file))
    for key in ("begin_ids", "end_ids"):
        if values.get(key) is not None:
            values[key] = tuple(values[key])
    return Description(architecture=config.model, **values)


def model_config(path: str | Path, overrides: Any = ()) -> RunConfig:
    """A run of a model directory's architecture and vocabulary, to plan it.

    Args:
        path: the model directory.
        overrides: as for `cramjax.recipes.load_recipe`.

    Raises:
        UserError: it is no model directory, or a field is unknown or impossible.
    """
    description = read_description(path)
    config = description.run_config()
    tokenizer = replace(config.tokenizer, kind="file", path=str(Path(path).expanduser() / "tokenizer.json"))
    config = replace(config, tokenizer=replace(tokenizer, vocab_size=description.vocab_size))
    validate(config)
    return override(config, overrides) if overrides else config
