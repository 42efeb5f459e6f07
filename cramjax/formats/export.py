"""Export: the class of another library that computes exactly a model of ours, its configuration, tensors and tokenizer.

A class is exact if its configuration, as we would write it, is read back as the architecture it was written from, up to
what weights of a special value make equal: norms of weight one, biases of zero, a copy of a tied matrix. What differs
beyond that is named. Every export is read again and compared before its directory is kept.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from cramjax.config import ModelConfig
from cramjax.data import Tokenizer
from cramjax.errors import ModelError
from cramjax.formats.codes import matrix_of
from cramjax.formats.directory import new_directory, new_file
from cramjax.formats.families import FAMILIES, read_architecture
from cramjax.formats.family import Architecture, Family, Kind, head_dim, kv_heads, layers_of
from cramjax.formats.fold import folded, with_weights_of
from cramjax.formats.hub import INDEX, Source, headless, open_directory
from cramjax.formats.quantised import Layout, outputs_of, quantization_config, scheme_of
from cramjax.formats.table import ONE_MORE, Piece, flatten, read_params, write_params
from cramjax.formats.tensors import Output, shards, write_safetensors
from cramjax.formats.tokens import special_ids, write_tokenizer
from cramjax.kernels.packed import is_packed, unpacked
from cramjax.model import Model, make_model
from cramjax.model.pattern import layer_configs

SHARD_BYTES = 5_000_000_000
"""Most bytes of a file of weights."""


_CODES = "codes are written for: export the model that it was compressed from, or floating point numbers (--dequantise)"


@dataclass(frozen=True)
class Exported:
    """A model to export, in its parts."""

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    kind: Kind
    context: int
    chat_template: str | None = None
    family: str | None = None
    """Of the model that it was imported from, which is tried first."""

    @property
    def architecture(self) -> Architecture:
        """What it is beside its weights."""
        return Architecture(self.model.config, self.model.vocab_size, self.context, self.kind)


@dataclass(frozen=True)
class Fit:
    """A class, the configuration of it that is nearest to a model, and in what the two differ."""

    family: Family
    class_: str
    hf_config: dict[str, Any]
    architecture: Architecture
    """What that configuration says."""
    differences: tuple[str, ...]
    """Fields of the model's configuration that the class does not have, with their values."""


def export_hf(given: Exported, out: Path) -> Path:
    """Write a directory that `transformers` loads, with `AutoModelForCausalLM` or `AutoModelForMaskedLM`.

    Raises:
        ModelError: no class computes exactly this model, or the directory exists or cannot be written.
    """
    given, fit = exact_class(given)
    target = _target(given, fit)
    params = with_weights_of(given.params, target)
    with new_directory(out) as path:
        _write_config(path, fit, given)
        _write_weights(path, write_params(params, fit.family.table(fit.hf_config), target))
        causal = given.kind == "causal"
        write_tokenizer(path, given.tokenizer, given.chat_template, given.context, causal=causal)
        _verify(open_directory(path), params, target)
    return out


def export_quantised(given: Exported, out: Path, layout: Layout) -> Path:
    """Write a directory of a quantised model with its codes and scales, as `transformers` and vLLM load it.

    Raises:
        ModelError: no class computes a model with these very matrices, the layout cannot hold them, or the directory
            exists or cannot be written.
    """
    fit = plain_class(given, _CODES)
    scheme = scheme_of(dict(flatten(given.params)))
    target = _target(given, fit)
    params = with_weights_of(given.params, target)
    head_dim = target.sizes.head_dim

    def packed(leaf: Any, piece: Piece, name: str) -> list[Output]:
        shape = (piece.shape[1], piece.shape[0])
        return outputs_of(layout, scheme, name, shape, lambda: matrix_of(leaf, piece, head_dim))

    with new_directory(out) as path:
        _write_config(path, fit, given, {"quantization_config": quantization_config(layout, scheme)})
        _write_weights(path, write_params(params, fit.family.table(fit.hf_config), target, packed))
        write_tokenizer(path, given.tokenizer, given.chat_template, given.context, causal=given.kind == "causal")
        _verify(open_directory(path), params, target)
    return out


def _target(given: Exported, fit: Fit) -> Model:
    """The model of the configuration that is written."""
    return make_model(
        replace(fit.architecture.config, vocab_multiple=1),
        vocab_size=given.model.vocab_size,
        sequence_length=given.context,
        causal=given.kind == "causal",
        param_dtype=given.model.param_dtype,  # pyright: ignore[reportArgumentType]
    )


def exact_class(given: Exported) -> tuple[Exported, Fit]:
    """The class that computes a model, which may have been rewritten for it (µP's factors folded into weights).

    Raises:
        ModelError: there is none; what has no class is named.
    """
    rewritten = folded(given.model, given.params)
    candidates = [given]
    if rewritten is not None:
        candidates.append(replace(given, model=rewritten[0], params=rewritten[1]))
    fits = [(each, fit) for each in candidates for fit in _fits(each)]
    for each, fit in fits:
        if not fit.differences:
            return each, fit
    fits = [fit for each, fit in fits if each is candidates[-1]]
    best = min(fits, key=lambda fit: len(fit.differences))
    nowhere = set.intersection(*({d.partition("=")[0] for d in fit.differences} for fit in fits))
    never = [d for d in best.differences if d.partition("=")[0] in nowhere]
    others = [d for d in best.differences if d not in never]
    sentences = []
    if never:
        sentences.append(f"no class has {', '.join(never)}")
    if others:
        sentences.append(f"{best.class_}, the nearest, has no {', '.join(others)}")
    raise ModelError(
        f"no class of transformers computes exactly this model: {'; '.join(sentences)}. An export is exact or none: "
        "train a model without, or use this one with cramjax."
    )


def plain_class(given: Exported, what: str = "adapters are for: merge the adapters, and export the model") -> Fit:
    """The class that computes a model with the matrices that it has, none of which is rewritten.

    Args:
        given: the model.
        what: is for these matrices, and what to do instead.

    Raises:
        ModelError: there is none.
    """
    fit = next((fit for fit in _fits(given) if not fit.differences), None)
    if fit is None:
        raise ModelError(
            f"no class of transformers computes this model with the very matrices that it has, which {what}."
        )
    return fit


def _fits(given: Exported) -> list[Fit]:
    """The nearest configuration of each family, that of the model's origin first."""
    families = sorted(FAMILIES.values(), key=lambda family: family.name != given.family)
    nearby = [nearest(family, given.architecture) for family in families if given.kind in family.classes]
    return [fit for fit in nearby if fit is not None and _counts_positions(fit, given)]


def _counts_positions(fit: Fit, given: Exported) -> bool:
    """Whether the class gives every token its position: RoBERTa's gives none to one, which must be that of padding."""
    own = given.tokenizer.pad_id
    return fit.family.name == given.family or fit.hf_config.get("pad_token_id", own) == own


def nearest(family: Family, given: Architecture) -> Fit | None:
    """The configuration of a family that is nearest to an architecture; None where even that cannot be."""
    config = {
        "model_type": family.name,
        "architectures": [family.classes[given.kind]],
        **family.write(given),
    }
    try:
        again = read_architecture(config)
    except ModelError:  # such as heads that do not divide the width
        return None
    if given.kind == "encoder":
        again = headless(again)
    differences = tuple(_differences(given, again))
    return Fit(family, family.classes[given.kind], config, again, differences)


# Fields that say how a model starts or is trained, not what it computes of one document.
_TRAINING = {
    "init_std",
    "depth_scaled_init",
    "zero_init_outputs",
    "dropout",
    "vocab_multiple",
    "mup_base_width",
    "mup_base_head_dim",
    "mask_documents",
}


def _differences(ours: Architecture, theirs: Architecture) -> Iterator[str]:
    """What of an architecture another has not, not even with weights of a special value."""
    mine, other = _canonical(ours), _canonical(theirs)
    for field, value in mine.items():
        if value == other[field] or _given_by_weights(field, mine, other):
            continue
        of_blocks = field == "pattern" and not ours.config.pattern
        for name in _fields_of_blocks(value, other[field]) if of_blocks else [field]:
            shown = getattr(ours.config, name, value)
            shown = json.dumps(asdict(shown) if hasattr(shown, "__dataclass_fields__") else shown, default=asdict)
            yield f"model.{name}={shown}"


def _fields_of_blocks(mine: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> list[str]:
    """What a model without a pattern calls the fields in which its blocks differ from others."""
    places = {"window": 0, "rope_base": 1}
    pairs = list(zip(mine, other, strict=True))
    found = [field for field, place in places.items() if any(a[place] != b[place] for a, b in pairs)]
    return found or ["pattern"]


def _given_by_weights(field: str, mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether weights of a special value give what a field says: zeros, ones, or a copy."""
    wanted = (mine[field], other[field])
    match field:
        case "norm_affine" | "norm_bias" | "bias" | "qkv_bias" | "head_bias" | "head_transform_bias" | "qk_norm_weight":
            return wanted == (False, True)
        case "tied":
            return wanted == (True, False)
        case "token_types":
            return wanted[0] == 0
        case "positions":
            return wanted == ("sinusoidal", "learned")
    return False


def _canonical(given: Architecture) -> dict[str, Any]:
    """The fields that say what a model computes, each in one form."""
    config = given.config
    values = {field: getattr(config, field) for field in config.__dataclass_fields__ if field not in _TRAINING}
    centred, rotary = config.norm == "layernorm", config.positions == "rotary"
    scale = config.attention_scale or head_dim(config) ** -0.5
    if config.mup_base_head_dim and config.attention_scale is None:
        scale *= (config.mup_base_head_dim / head_dim(config)) ** 0.5
    values |= {
        "kv_heads": kv_heads(config),
        "head_dim": head_dim(config),
        "max_positions": (config.max_positions or given.context)
        if config.positions in ("learned", "sinusoidal")
        else 0,
        "norm_bias": centred and config.norm_affine and config.norm_bias,
        "qkv_bias": config.bias or config.qkv_bias,
        "qk_norm_weight": config.qk_norm and config.qk_norm_weight,
        "head_transform_bias": config.head_transform and config.head_transform_bias,
        "attention_scale": float(f"{scale:.9g}"),
        "embedding_scale": float(f"{config.embedding_scale:.9g}"),
        "adaptive_head": tuple(cut for cut in config.adaptive_head if cut < given.vocab_size),
        "rope_base": None,
        "window": None,
        "pattern": [
            (*_canonical_block(config, block, given.context), own.experts)
            for block, own in zip(layers_of(config), layer_configs(config), strict=True)
        ],
        "experts": _canonical_experts(config),
    }
    if all(own.experts for own in layer_configs(config)):
        values["mlp"] = None  # no block has such a layer
    values["rope_scaling"] = config.rope_scaling if rotary else None
    if config.mup_base_width not in (None, config.width):
        values["mup_base_width"] = config.mup_base_width
    else:
        values["mup_base_width"] = None
    return values


def _canonical_experts(config: ModelConfig) -> tuple[Any, ...] | None:
    """What experts compute, beside where they are."""
    own = config.experts
    if own is None:
        return None
    width = own.width or config.mlp // (own.active + own.shared)
    normalised = own.normalised and own.active > 1
    return own.number, own.active, own.shared * width, own.shared_gate, width, own.scores, normalised


def _canonical_block(config: ModelConfig, block: Any, context: int) -> tuple[Any, ...]:
    window = None if block.window is None or block.window >= context else block.window
    turned = config.positions == "rotary" and block.rotary
    base = (block.rope_base or config.rope_base) if turned else None
    return window, base, turned and block.rope_scaled and config.rope_scaling is not None, turned, block.attention_norm


def _write_config(path: Path, fit: Fit, given: Exported, more: Mapping[str, Any] | None = None) -> None:
    ids = special_ids(given.tokenizer)
    if "pad_token_id" in fit.hf_config:  # RoBERTa's positions are counted from it
        ids["pad_token_id"] = fit.hf_config["pad_token_id"]
    config = {
        **fit.hf_config,
        **{key: value for key, value in ids.items() if value is not None},
        "torch_dtype": given.model.param_dtype,
        **(more or {}),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if given.kind == "causal":
        generation = {key: value for key, value in ids.items() if value is not None}
        generation = {**generation, "do_sample": True, "temperature": 0.8}
        (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, outputs: Sequence[Output]) -> None:
    groups = shards(outputs, SHARD_BYTES)
    if len(groups) == 1:
        write_safetensors(path / "model.safetensors", groups[0])
        return
    names = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_safetensors(path / file, group)
        names |= {output.name: file for output in group}
    index = {"metadata": {"total_size": sum(output.bytes for output in outputs)}, "weight_map": names}
    (path / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _verify(source: Source, params: PyTree, target: Model, numbers: Callable[[Any], Any] = unpacked) -> None:
    """Read an export again, and compare every number with what was to be written.

    Args:
        source: the export.
        params: what was to be written.
        target: the model of its configuration.
        numbers: of a leaf in the file, given the leaf.

    Raises:
        ModelError: one differs: the export is not kept.
    """
    wanted = dict(flatten(params))
    table = source.family.table(source.hf_config)

    def compare(name: str, array: np.ndarray) -> None:
        expected = np.asarray(numbers(wanted[name])).astype(array.dtype)
        if np.array_equal(array, expected):
            return
        generic = "/".join(key for key in name.split("/") if not key.isdigit())
        if any(part.change is ONE_MORE for part in table.get(generic, ())):
            # 1 + (w - 1) may round w in its last place.
            if np.max(np.abs(array.astype(np.float32) - expected.astype(np.float32))) <= 2.0**-23:
                return
        raise ModelError(f"the export of {name} is not read back as it was written, so nothing is kept: report this.")

    read_params(source.tensors, table, target, ignored=source.family.ignored, prefix=source.family.prefix, put=compare)


def export_gguf(given: Exported, out: Path) -> Path:
    """Write a GGUF file for llama.cpp, for models of Llama's family; packed matrices as blocks of their codes.

    Raises:
        ModelError: the model is of no architecture that llama.cpp computes and that is written here, or its tokenizer
            is none that it knows by name, or no blocks hold its codes; or the file exists or cannot be written.
    """
    from cramjax.formats.gguf import open_gguf, write_gguf
    from cramjax.formats.gguf_codes import blocks_of, written

    if any(map(is_packed, dict(flatten(given.params)).values())):
        fit = plain_class(given, _CODES)
    else:
        given, fit = exact_class(given)
    target = _target(given, fit)
    params = with_weights_of(given.params, target)
    head_dim = target.sizes.head_dim

    def packed(leaf: Any, piece: Piece, name: str) -> list[Output]:
        return [blocks_of(name, leaf, piece, head_dim)]

    with new_file(out) as path:
        outputs = write_params(params, fit.family.table(fit.hf_config), target, packed)
        write_gguf(path, fit.family.name, fit.hf_config, outputs, given.tokenizer, given.chat_template)
        _verify(open_gguf(path), params, target, written)
    return out
