"""Directories of Hugging Face models: `config.json`, safetensors in one file or in shards, tokenizer, chat template;
and what sentence-transformers writes beside them.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cramjax.data import Tokenizer
from cramjax.embeddings import EmbeddingConfig
from cramjax.errors import ModelError
from cramjax.formats.families import family_of, read_architecture
from cramjax.formats.family import Architecture, Family, HfConfig
from cramjax.formats.quantised import DequantisedTensors, reader_of
from cramjax.formats.sentences import read_embedding
from cramjax.formats.tensors import Tensors, open_safetensors
from cramjax.formats.tokens import read_chat_template, read_json, read_tokenizer

INDEX = "model.safetensors.index.json"
_CONVERT = (
    'convert it once where you trust it, with transformers.AutoModel.from_pretrained("DIR").save_pretrained("NEW") '
    "(classes with a head: AutoModelForCausalLM, AutoModelForMaskedLM), and import NEW."
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Source:
    """A model of others, opened: nothing of its weights is read yet."""

    family: Family
    hf_config: HfConfig
    architecture: Architecture
    tokenizer: Tokenizer
    chat_template: str | None
    tensors: Tensors
    embedding: EmbeddingConfig | None = None

    @property
    def param_dtype(self) -> str:
        """The precision that loses nothing: bfloat16 where all is stored in it, else float32.

        llama.cpp's files of BF16 have the weights of norms in F32, and are held in float32.
        """
        read = [name for name in self.tensors.names if not any(part in name for part in self.family.ignored)]
        stored = {str(self.tensors.dtype(name)) for name in read}
        return "bfloat16" if stored == {"bfloat16"} else "float32"


def open_directory(path: Path) -> Source:
    """Open a Hugging Face directory.

    Raises:
        ModelError: a file is missing, damaged or not what its name says, the family or an option is not known, or
            there are no weights that can be read without running code.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"{path} {what}: give a directory with config.json and safetensors, a GGUF file, or hub:NAME for a model "
            "of the Hugging Face hub."
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give the directory of a Hugging Face model, or a GGUF file.")
    config = read_json(path / "config.json")
    architecture = read_architecture(config)
    quantisation = config.get("quantization_config") or config.get("compression_config")
    reader = None if not quantisation else reader_of(quantisation)
    tensors: Tensors = open_safetensors(_weight_files(path))
    if reader is not None:
        tensors = DequantisedTensors(tensors, reader)
    opened = open_source(
        config,
        architecture,
        read_tokenizer(path, config, causal=architecture.kind == "causal"),
        read_chat_template(path),
        tensors,
    )
    return replace(opened, embedding=read_embedding(path, opened.architecture.context))


def open_source(
    config: HfConfig, architecture: Architecture, tokenizer: Tokenizer, chat_template: str | None, tensors: Tensors
) -> Source:
    """A source from its parts, which must fit each other.

    Raises:
        ModelError: the tokenizer has more tokens than the model has rows.
    """
    family = family_of(config)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and the model {architecture.vocab_size:,} rows: give "
            "the tokenizer that belongs to the model."
        )
    if family.head is not None and not any(name.startswith(family.head) for name in tensors.names):
        architecture = headless(architecture)
    return Source(family, config, architecture, tokenizer, chat_template, family.view(tensors))


def headless(given: Architecture) -> Architecture:
    """A bidirectional model without its head: what it gives is the stream after the last block."""
    config = replace(given.config, head_transform=False, head_bias=False, tied=True)
    return replace(given, config=config, kind="encoder")


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        names = read_json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{path / INDEX} has no weight_map: copy or download it again.")
        return [path / Path(name).name for name in sorted(set(names.values()))]
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter"))
    if (path / "model.safetensors") in found:
        return [path / "model.safetensors"]
    if found:
        return found
    if (path / "adapter_model.safetensors").exists():
        raise ModelError(
            f"{path} holds an adapter, not a model: merge it into its model first (peft: merge_and_unload)."
        )
    if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
        raise ModelError(f"{path} holds its weights as {pickles[0]}, whose reading may run code: {_CONVERT}")
    raise ModelError(f"{path} has no *.safetensors: copy or download the weights.")


def download(name: str) -> Path:
    """The directory of a model of the Hugging Face hub, downloaded if need be.

    Args:
        name: such as `HuggingFaceTB/SmolLM2-135M`.

    Raises:
        ModelError: there is no such model, it is not to be had, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError("hub: needs the package huggingface_hub: pip install huggingface_hub.") from None
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    # Of directories, those of sentence-transformers' modules say something, in JSON.
    ignored = ["*/*.safetensors", "*/*.jinja", "*/*/*", "consolidated*"]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # of the network, of the hub, of the name: of many classes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".:") if lines else type(error).__name__
        raise ModelError(
            f"hub:{name} cannot be downloaded ({reason}): see its name and the network, or download its directory "
            "elsewhere and give the path."
        ) from None
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"hub:{name} has no safetensors. Pickled weights, as older models have, are not downloaded, for their "
            f"reading may run code: {_CONVERT}"
        )
    return path
