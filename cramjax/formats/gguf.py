"""GGUF, the format of llama.cpp: read as names and configurations of Hugging Face's models, and written from those.

A file holds metadata, a tokenizer and tensors, quantised or not; they are dequantised as they are read, one at a time.
Architectures `llama` and `smollm3` store the rows of queries and keys in the order of interleaved rotary positions,
Gemma 1 + w for the weights of its norms, and GPT-2 its matrices transposed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cramjax.data import Tokenizer
from cramjax.errors import ModelError
from cramjax.formats.codes import Matrix, Scheme
from cramjax.formats.families import read_architecture
from cramjax.formats.gguf_codes import SCHEMES, Blocks, blocks_read
from cramjax.formats.gguf_tokens import read_backend, special_ids, write_backend
from cramjax.formats.hub import Source, open_source
from cramjax.formats.tensors import Output, whole
from cramjax.formats.tokens import with_roles

_EXTRA = "GGUF files need the package gguf: pip install 'cramjax[gguf]'."


def _interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of paired halves, as Hugging Face has them, in the order of interleaved pairs."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _halves(x: np.ndarray, heads: int) -> np.ndarray:
    """The way back."""
    return x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


# Our side of a name (Hugging Face's) → GGUF's; what differs by architecture comes after.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_PRE = {"model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm"}
_SANDWICH = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "transformer.h.{}.ln_1": "blk.{}.attn_norm",
    "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
    "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
    "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
    "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
    "lm_head": "output",
}
_ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": _NAMES | _PRE,
    "qwen2": _NAMES | _PRE,
    "qwen3": _NAMES | _PRE,
    "smollm3": _NAMES | _PRE,
    "gemma2": _NAMES | _SANDWICH,
    "gemma3": _NAMES | _SANDWICH,
    "gpt2": _GPT2,
}
_WRITTEN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families that are written, and their architectures."""
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose rotary positions turn neighbouring rows of queries and keys."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names, dequantised as they are read."""

    tensors: Mapping[str, Any]
    architecture: str
    heads: int
    kv_heads: int

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one, as Hugging Face has it."""
        shape = tuple(int(size) for size in reversed(self.tensors[name].shape))
        return tuple(reversed(shape)) if self._transposed(name) else shape

    def dtype(self, name: str) -> np.dtype:
        """Of one; a quantised one becomes float32."""
        kind = self.tensors[name].tensor_type.name
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32))

    def read(self, name: str) -> np.ndarray:
        """One of them."""
        from gguf import quants

        tensor = self.tensors[name]
        if tensor.tensor_type.name in ("F32", "F16"):
            array = np.array(tensor.data)
        elif tensor.tensor_type.name == "BF16":
            array = np.array(tensor.data).view(ml_dtypes.bfloat16)
        else:
            try:
                array = quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ModelError(
                    f"the tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be read: "
                    "convert the file to F16 or Q8_0 with llama-quantize --allow-requantize."
                ) from None
        if self._transposed(name):
            return array.T
        array = self._in_halves(name, array)
        if self.architecture.startswith("gemma") and "norm." in name:
            return array.astype(np.float32) - np.float32(1)
        return array

    def scheme(self, name: str) -> Scheme | None:
        """How one is quantised; None: it is not, or in a way that no leaf of ours has."""
        return None if self._transposed(name) else SCHEMES.get(self.tensors[name].tensor_type.name)

    def matrix(self, name: str) -> Matrix:
        """One that has a scheme."""
        tensor = self.tensors[name]
        return blocks_read(self._in_halves(name, np.array(tensor.data)), tensor.tensor_type.name)

    def _in_halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows of queries or keys as Hugging Face has them; others as they are."""
        heads = {"q": self.heads, "k": self.kv_heads}
        turned = re.search(r"\.self_attn\.([qk])_proj\.", name)
        if self.architecture in _INTERLEAVED and turned is not None:
            return _halves(rows, heads[turned[1]])
        return rows

    def _transposed(self, name: str) -> bool:
        return self.architecture == "gpt2" and ".c_" in name and name.endswith(".weight")


def open_gguf(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
        ModelError: it is no GGUF file, damaged, of an architecture that is not known, or has a tokenizer that is not.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        what = "a safetensors file: give its directory" if path.suffix == ".safetensors" else "not a GGUF file"
        raise ModelError(f"{path} is {what}; a model is a Hugging Face directory, hub:NAME or a GGUF file.")
    try:
        import gguf
    except ImportError:
        raise ModelError(_EXTRA) from None
    try:
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except Exception as error:  # of many classes: the file is cut short or changed
        raise ModelError(f"{path} is not a whole GGUF file ({error}): copy or download it again.") from None
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ModelError(
            f"{path} is of architecture {name!r}, which cannot be read: choose from {', '.join(_ARCHITECTURES)}."
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    frequencies = found.pop("rope_freqs.weight", None)
    renamed = {_renamed(tensor, _ARCHITECTURES[name]): found[tensor] for tensor in found}
    config = _read_config(name, values, found, None if frequencies is None else np.array(frequencies.data))
    architecture = read_architecture(config)
    backend = read_backend(values)
    texts = values["tokenizer.ggml.tokens"]
    named = {_ROLES[key]: texts[index] for key, index in special_ids(values, _ROLES).items()}
    tokenizer = with_roles(backend, named, [], causal=True, where=str(path))
    heads = config.get("num_attention_heads") or config["n_head"]
    tensors = GgufTensors(renamed, name, heads, config.get("num_key_value_heads") or heads)
    return open_source(config, architecture, tokenizer, values.get("tokenizer.chat_template"), tensors)


_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "mask": "mask_token"}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Hugging Face's name of a tensor; one that is not known keeps its own, and is told as left over."""
    number = re.search(r"\.(\d+)\.", name)
    stem, _, part = name.rpartition(".")
    if number is not None:
        stem = stem.replace(number[0], ".{}.", 1)
    theirs = next((theirs for theirs, ours in names.items() if ours == stem), None)
    return name if theirs is None else f"{theirs.format(number[1] if number else '')}.{part}"


def _read_config(
    name: str, values: Mapping[str, Any], tensors: Mapping[str, Any], frequencies: np.ndarray | None
) -> dict[str, Any]:
    """The `config.json` that the metadata stand for."""

    def get(key: str, default: Any = None) -> Any:
        return values.get(f"{name}.{key}", default)

    vocab = int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0
    tied = "output.weight" not in tensors
    if name == "gpt2":
        return {
            "model_type": "gpt2",
            "n_layer": get("block_count"),
            "n_embd": get("embedding_length"),
            "n_head": get("attention.head_count"),
            "n_inner": get("feed_forward_length"),
            "n_positions": get("context_length"),
            "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
            "tie_word_embeddings": tied,
            "vocab_size": vocab,
        }
    heads, width = get("attention.head_count"), get("embedding_length")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise ModelError(f"the metadata {name}.attention.head_count and {name}.embedding_length must be numbers.")
    head = get("attention.key_length") or width // heads
    if get("rope.dimension_count", head) != head:
        raise ModelError(f"rotary positions that turn {get('rope.dimension_count')} of {head} columns are not here.")
    if get("expert_count"):
        raise ModelError("its feed-forward layers are mixtures of experts, which are not here.")
    config: dict[str, Any] = {
        "model_type": {"gemma3": "gemma3_text"}.get(name, name),
        "num_hidden_layers": get("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head,
        "intermediate_size": get("feed_forward_length"),
        # Stored in float32: 9.999999747378752e-06 stands for 1e-5.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "max_position_embeddings": get("context_length", 2048),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "attention_bias": name == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": name == "llama" and "blk.0.ffn_up.bias" in tensors,
    }
    if name.startswith("gemma"):
        # The largest models of both generations (27B) scale by the width of the stream over the heads.
        largest = get("block_count") == {"gemma2": 46, "gemma3": 62}[name]
        config |= {
            "query_pre_attn_scalar": width // heads if largest else head,
            "sliding_window": get("attention.sliding_window", 4096),
            "final_logit_softcapping": get("final_logit_softcapping"),
            "attn_logit_softcapping": get("attn_logit_softcapping"),
        }
    return config | _read_scaling(get, config, frequencies)


def _read_scaling(get: Callable[..., Any], config: Mapping[str, Any], frequencies: np.ndarray | None) -> dict[str, Any]:
    kind = get("rope.scaling.type", "none")
    if frequencies is not None:
        # The slowest frequency tells the factor, as far as it is slowed down.
        kept = _kept(config["rope_theta"], config["head_dim"], _LLAMA3)[-1]
        factor = (1 - kept) / (1 / float(frequencies[-1]) - kept) if kept < 1 else 1.0
        scaling = {"rope_type": "llama3", "factor": float(f"{factor:.5g}"), **_LLAMA3}
        made = llama3_divisors(config["rope_theta"], config["head_dim"], scaling)
        if not np.allclose(made, frequencies, rtol=1e-4):
            raise ModelError("the tensor rope_freqs.weight is of a scaling that is not known here (only Llama 3's is).")
        return {"rope_scaling": scaling}
    if kind in ("none", None):
        return {}
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor", 1.0)}
    if get("rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    for key in ("beta_fast", "beta_slow"):
        if get(f"rope.scaling.yarn_{key}") is not None:
            scaling[key] = get(f"rope.scaling.yarn_{key}")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if get(f"rope.scaling.{key}") not in (None, 1.0):
            raise ModelError(f"the metadata {key}={get(f'rope.scaling.{key}')} of its rotary positions is not here.")
    return {"rope_scaling": scaling}


def llama3_divisors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What each frequency is divided by under Llama 3's scaling, float32."""
    kept = _kept(base, head_dim, scaling)
    return (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)


def _kept(base: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """How much of each frequency Llama 3's scaling leaves alone, from 0 to 1."""
    waves = 2 * np.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)


def write_gguf(
    path: Path,
    family: str,
    config: Mapping[str, Any],
    outputs: Sequence[Output],
    tokenizer: Tokenizer,
    chat_template: str | None,
) -> None:
    """Write a GGUF file, a tensor at a time.

    Args:
        path: of the file.
        family: of Hugging Face's class.
        config: its `config.json`.
        outputs: its tensors.
        tokenizer: byte-level BPE.
        chat_template: Jinja, or None.

    Raises:
        ModelError: llama.cpp computes no such model, or splits no text as the tokenizer does.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(_EXTRA) from None
    name = _WRITTEN.get(family)
    if name is None:
        raise ModelError(
            f"a GGUF file is written for models of Llama's family ({', '.join(_WRITTEN)}), and this is {family}: use "
            "--format hf."
        )
    if config.get("hidden_act") != "silu":
        raise ModelError(
            f"llama.cpp has only swiglu in this architecture, and this model has {config['hidden_act']!r}."
        )
    if config.get("sliding_window"):
        raise ModelError("llama.cpp's architecture has no window, and this model has one: use --format hf.")
    writer = gguf.GGUFWriter(path, name)
    _write_values(writer, config)
    write_backend(writer, tokenizer, config["vocab_size"])
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    tensors = [_named(output, name) for output in outputs]
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        if name != "llama":
            raise ModelError(f"llama.cpp has no Llama 3 scaling in architecture {name}: use --format hf.")
        divisors = llama3_divisors(config["rope_theta"], config["head_dim"], scaling)
        tensors.append(whole("rope_freqs.weight", divisors.shape, np.float32, lambda: divisors))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for output in tensors:
        kind = _kind(output)
        stored, shape = output.dtype, output.shape
        if kind == "BF16":
            stored, shape = np.dtype(np.uint8), (*shape[:-1], 2 * shape[-1])
        writer.add_tensor_info(output.name, shape, stored, output.bytes, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in tensors:
        (array,) = output.pieces()
        array = array.astype(output.dtype)
        turned = re.search(r"\.attn_([qk])\.", output.name)
        if name in _INTERLEAVED and turned is not None:
            array = _interleaved(array, heads[turned[1]])
        stored = np.float32 if _kind(output) == "F32" else np.uint8
        writer.write_tensor_data(np.ascontiguousarray(array).view(stored))
    writer.close()


def _kind(output: Output) -> str:
    """What GGUF calls the type of a tensor."""
    if isinstance(output, Blocks):
        return output.kind
    return "F32" if output.dtype == np.float32 else "BF16"


def _write_values(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        if {key: scaling[key] for key in ("beta_fast", "beta_slow", "truncate")} != _YARN or scaling.get(
            "attention_factor"
        ):
            raise ModelError(
                "llama.cpp has only the usual settings of yarn, and this model has others: use --format hf."
            )
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def _named(output: Output, name: str) -> Output:
    """A tensor under GGUF's name; norms and biases are always float32."""
    number = re.search(r"\.(\d+)\.", output.name)
    stem, _, part = output.name.rpartition(".")
    generic = stem.replace(number[0], ".{}.", 1) if number else stem
    title = _ARCHITECTURES[name][generic].format(number[1] if number else "")
    dtype = np.dtype(np.float32) if len(output.shape) == 1 else output.dtype
    return replace(output, name=f"{title}.{part}", dtype=dtype)
