"""Adapters as the library peft keeps them: `adapter_config.json` and `adapter_model.safetensors`, both ways.

LoRA (rsLoRA, DoRA), IA3, prompts and prefixes. Which module of theirs a matrix of ours is, the families' tables say.
Adapters of matrices that are one of ours and several of theirs, or of many layers, are put together; what no leaf here
computes exactly is refused by name.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.formats.directory import new_directory
from cramjax.formats.peft_modules import ROOT, Base, Module, Modules, read_part, refuse_twins
from cramjax.formats.peft_virtual import KINDS, read_virtual, write_virtual
from cramjax.formats.table import flatten, unflatten
from cramjax.formats.tensors import SafetensorsFiles, open_safetensors, whole, write_safetensors
from cramjax.kernels.packed import LowRank, Packed, Scaled, Virtual, column_lengths, is_adapter, on_base

_log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_COPY = "base_layer.weight"

Array = np.ndarray


def read_adapter(directory: str | Path, given: Base) -> PyTree:
    """A model's parameters with the adapter of a directory.

    Args:
        directory: as peft writes it.
        given: the model that it is for, without adapters.

    Raises:
        ModelError: a file is missing or damaged; the adapter is of another model, or does what no leaf here does.
    """
    path = Path(directory).expanduser()
    config = _read_config(path)
    _warn_of_other_base(path, config.get("base_model_name_or_path"), given)
    tensors = _open(path)
    if config["peft_type"] in KINDS:
        return read_virtual(tensors, config, given)
    modules = Modules(given)
    found = modules.found(tensors)
    make = _read_low_rank if config["peft_type"] == "LORA" else _read_scaled
    leaves = dict(flatten(given.params))
    for ours, theirs in modules.by_path.items():
        own = [module for module in theirs if module.name in found]
        if own:
            refuse_twins(own)
            adapter = make(ours, leaves[ours], theirs, found, tensors, config, modules.head_dim)
            leaves[ours] = on_base(ours, adapter, leaves[ours])
    return unflatten(leaves, given.params)


def write_adapter(directory: str | Path, params: PyTree, given: Base) -> Path:
    """Write the adapters of a model's parameters as a directory that peft reads.

    Args:
        directory: to make.
        params: with adapters on some of their matrices.
        given: the model that they are of.

    Raises:
        ModelError: no class of transformers computes the model, or peft has no adapter that computes these; there are
            none; or the directory exists or cannot be written.
    """
    adapters = {path: leaf for path, leaf in flatten(params) if is_adapter(leaf)}
    kinds = {type(leaf) for leaf in adapters.values()}
    if not kinds:
        raise ModelError("The model has no adapters to be written.")
    if len(kinds) > 1:
        raise ModelError("peft has adapters of one kind in a directory, and this model has several.")
    if issubclass(next(iter(kinds)), Virtual):
        (config, tensors), task = write_virtual(adapters, given), "FEATURE_EXTRACTION"
    else:
        config, tensors = _of_matrices(adapters, given)
        task = None
    config |= {
        "base_model_name_or_path": _base_of(given),
        "inference_mode": True,
        "task_type": "CAUSAL_LM" if given.kind == "causal" else task,
    }
    with new_directory(directory) as path:
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        outputs = [whole(name, x.shape, x.dtype, lambda x=x: x) for name, x in sorted(tensors.items())]
        write_safetensors(path / WEIGHTS, outputs)
    return Path(directory).expanduser()


def _base_of(given: Base) -> str | None:
    """What a model's weights without its adapter are called, as far as that is known; of a hub's model its name there.

    What an adapter was merged into is what it was called no more.
    """
    named = None if "merged" in given.origin else given.origin.get("base") or given.origin.get("imported_from")
    return None if named is None else str(named).removeprefix("hub:")


def _warn_of_other_base(path: Path, named: Any, given: Base) -> None:
    """Say that an adapter names another model than the one that it is read for; a copy may lie anywhere."""
    own = _base_of(given) or str(given.path)
    if not named or named == own:
        return
    one, other = Path(str(named)), Path(own)
    if one.name != other.name or (one.is_absolute() and other.is_absolute()):
        _log.warning(
            f"{path / CONFIG} names {named} as the base of the adapter, and the model given is {own}: shapes alone are "
            "compared, so make sure that the two are the same."
        )


def _of_matrices(adapters: Mapping[str, Any], given: Base) -> tuple[dict[str, Any], dict[str, Array]]:
    """The configuration and the tensors of adapters that change matrices."""
    modules = Modules(given)
    write = _write_low_rank if isinstance(next(iter(adapters.values())), LowRank) else _write_scaled
    tensors: dict[str, Array] = {}
    config = write(adapters, modules, tensors)
    targets = [module for module in modules.all if any(name.startswith(f"{ROOT}{module.name}.") for name in tensors)]
    refuse_twins(targets)
    config["fan_in_fan_out"] = not all(module.piece.part.transposed for module in targets)
    return {**config, "modules_to_save": None}, tensors


_INERT: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (),
    "trainable_token_indices": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "target_parameters": (),
    "lora_bias": (),
    "use_qalora": (),
    "use_bdlora": (),
    "arrow_config": (),
    "velora_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
"""Values of peft's options with which an adapter is what it is here, beside null, false and nothing at all."""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} has no {CONFIG}: give the directory of an adapter that peft wrote.") from None
    except ValueError:
        raise ModelError(f"{path / CONFIG} is damaged (it is not JSON): copy or download it again.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in (known := ("LORA", "IA3", *KINDS)):
        raise ModelError(f"{path / CONFIG} is of peft_type {kind!r}: adapters of type {', '.join(known)} can be read.")
    for option, values in _INERT.items():
        if config.get(option) and config[option] not in values:
            raise ModelError(
                f"{path / CONFIG} has {option}={config[option]!r}, which has no counterpart here: save the adapter "
                "without, or merge it with peft and import the model."
            )
    return config


def _open(path: Path) -> SafetensorsFiles:
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
        raise ModelError(
            f"{path} has its weights in adapter_model.bin alone, a pickle, which may hold code and is not read: save "
            "the adapter as safetensors."
        )
    return open_safetensors([path / WEIGHTS])


def _read_low_rank(
    ours: str,
    base: Any,
    theirs: Sequence[Module],
    found: Mapping[str, Mapping[str, str]],
    tensors: SafetensorsFiles,
    config: Mapping[str, Any],
    head_dim: int,
) -> LowRank:
    own = [module for module in theirs if module.name in found]
    settings = {module.name: _rank_and_scale(module.name, config) for module in own}
    if len(set(settings.values())) > 1:
        (first, one), (second, other) = next((a, b) for a in settings.items() for b in settings.items() if a[1] != b[1])
        raise ModelError(
            f"{first} has an adapter of rank {one[0]} and scale {one[1]:g}, and {second} of {other[0]} and "
            f"{other[1]:g}: both are in {ours}, whose adapters have one rank and one scale."
        )
    rank, scale = settings[own[0].name]
    parts = max(module.place for module in theirs) + 1
    *lead, inner, outer = base.shape
    a, b = np.zeros((*lead, inner, parts * rank), np.float32), np.zeros((*lead, rank, outer), np.float32)
    magnitude = np.array(column_lengths(base)) if config.get("use_dora") else None
    for module in own:
        names, piece = found[module.name], module.piece
        wanted = {"lora_A.weight": (rank, inner), "lora_B.weight": (piece.shape[-1], rank)}
        wanted |= {} if magnitude is None else {"lora_magnitude_vector": piece.shape[-1:]}
        if names.keys() - {_COPY} != wanted.keys():
            raise ModelError(
                f"{module.name} has {', '.join(sorted(names))} in the adapter, and needs "
                f"{', '.join(wanted)}: it is damaged."
            )
        read = {ending: read_part(tensors, names[ending], shape, module) for ending, shape in wanted.items()}
        if _COPY in names:
            _refuse_other_copy(tensors, names[_COPY], module, base)
        module.layer(a)[:, module.place * rank : (module.place + 1) * rank] = read["lora_A.weight"].T
        module.layer(b)[:, piece.columns] = piece.part.change.read(read["lora_B.weight"], head_dim).T
        if magnitude is not None:
            module.layer(magnitude)[0, piece.columns] = piece.part.change.read(read["lora_magnitude_vector"], head_dim)
    widths = tuple(module.piece.shape[-1] for module in theirs[:parts]) if parts > 1 else ()
    trained = (None if part is None else jnp.asarray(part) for part in (a, b, magnitude))
    return LowRank(None, *trained, scale=scale, widths=widths)


def _refuse_other_copy(tensors: SafetensorsFiles, name: str, module: Module, base: Any) -> None:
    """Refuse an adapter with a matrix to the vocabulary of its own; peft puts a copy of it into the file."""
    piece = module.piece
    stored = read_part(tensors, name, piece.shape[::-1], module).T
    if not isinstance(base, Packed) and not np.array_equal(stored, np.float32(module.layer(base)[:, piece.columns])):
        raise ModelError(f"the adapter has a {module.name} of its own ({name}), not the model's: merge it first.")


def _rank_and_scale(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    try:
        rank = int(_patterned(config.get("rank_pattern"), name, config["r"]))
        alpha = float(_patterned(config.get("alpha_pattern"), name, config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error):
        raise ModelError(
            f"{CONFIG} gives no rank and alpha for {name} (r={config.get('r')!r}, lora_alpha="
            f"{config.get('lora_alpha')!r}): copy or download the adapter again."
        ) from None
    return rank, scale


def _patterned(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """A value of the first pattern that the end of a module's name matches, as peft matches them."""
    patterns = patterns or {}
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), default)


def _write_low_rank(adapters: Mapping[str, Any], modules: Modules, tensors: dict[str, Array]) -> dict[str, Any]:
    dora = {leaf.magnitude is not None for leaf in adapters.values()}
    if len(dora) > 1:
        raise ModelError("peft has magnitudes (DoRA) of all matrices or of none, and this model of some.")
    chosen: dict[str, tuple[int, float]] = {}
    for path, leaf in adapters.items():
        parts = {name: np.asarray(getattr(leaf, name)) for name in leaf.trained if getattr(leaf, name) is not None}
        lengths = np.asarray(column_lengths(leaf.base)) if True in dora else None
        for module in modules.by_path[path]:
            layer = {name: module.layer(part) for name, part in parts.items()}
            columns, change = module.piece.columns, module.piece.part.change
            a, b = _factors(layer["a"], layer["b"], leaf.widths, columns)
            kept = lengths is None or np.allclose(layer["magnitude"][0, columns], module.layer(lengths)[0, columns])
            if kept and not a.any() and not b.any():
                continue  # as those are that were read where there was no adapter
            name = f"{ROOT}{module.name}"
            tensors[f"{name}.lora_A.weight"] = a
            tensors[f"{name}.lora_B.weight"] = change.write(b, modules.head_dim)
            if lengths is not None:
                magnitude = change.write(layer["magnitude"][0, columns], modules.head_dim)
                tensors[f"{name}.lora_magnitude_vector"] = magnitude
            chosen[module.name] = len(a), leaf.scale
    if not chosen:
        raise ModelError("The model's adapters are zero everywhere: there is nothing to be written.")
    return {"peft_type": "LORA", "use_dora": True in dora, "bias": "none", **_ranks(modules.entries(chosen))}


def _factors(a: Array, b: Array, widths: tuple[int, ...], columns: slice) -> tuple[Array, Array]:
    """What of adapters side by side concerns some columns, as one adapter: (rank, inner) and (columns, rank)."""
    rank, ends = b.shape[0], np.cumsum((0, *(widths or b.shape[1:])))
    ins, outs = [], []
    for place, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        first, last = max(start, columns.start), min(stop, columns.stop)
        if first < last:
            own = np.zeros((columns.stop - columns.start, rank), np.float32)
            own[first - columns.start : last - columns.start] = b[:, first:last].T
            ins.append(a[:, place * rank : (place + 1) * rank].T)
            outs.append(own)
    return np.concatenate(ins), np.concatenate(outs, axis=1)


def _ranks(entries: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Ranks and α of modules, as configurations have them: one of most, and patterns for the others."""
    (rank, scale), _ = Counter(entries.values()).most_common(1)[0]

    def is_whole(x: float) -> bool:
        return abs(x - round(x)) < 1e-9 * max(1.0, x)

    rooted = not is_whole(scale * rank) and is_whole(scale * math.sqrt(rank))

    def alpha(rank: int, scale: float) -> float:
        exact = scale * (math.sqrt(rank) if rooted else rank)
        return round(exact) if is_whole(exact) else exact

    others = {entry: own for entry, own in entries.items() if own != (rank, scale)}
    return {
        "r": rank,
        "lora_alpha": alpha(rank, scale),
        "lora_dropout": 0.0,
        "use_rslora": rooted,
        "target_modules": sorted(entries),
        "rank_pattern": {entry: own[0] for entry, own in others.items()},
        "alpha_pattern": {entry: alpha(*own) for entry, own in others.items()},
    }


def _read_scaled(
    ours: str,
    base: Any,
    theirs: Sequence[Module],
    found: Mapping[str, Mapping[str, str]],
    tensors: SafetensorsFiles,
    config: Mapping[str, Any],
    head_dim: int,
) -> Scaled:
    own = [module for module in theirs if module.name in found]
    forward = config.get("feedforward_modules") or ()
    *lead, inner, outer = base.shape
    before = [module for module in own if _is_forward(module.name, forward)]
    after = [module for module in own if module not in before]
    if before and (after or len(before) < len(theirs)) and max(module.place for module in theirs):
        raise ModelError(
            f"{before[0].name} has factors of its inputs, which in {ours} are those of other matrices too: all of them "
            "would need the same."
        )
    inputs = np.ones((*lead, inner, 1), np.float32) if before else None
    for module in before:
        vector = read_part(tensors, _only(found, module), (1, inner), module)[0]
        if module.place and not np.array_equal(vector, module.layer(inputs)[:, 0]):  # pyright: ignore[reportArgumentType]
            raise ModelError(f"{module.name} has other factors of its inputs than the matrices beside it in {ours}.")
        module.layer(inputs)[:, 0] = vector  # pyright: ignore[reportArgumentType]
    start = min((module.piece.columns.start for module in after), default=0)
    outputs = np.ones((*lead, 1, outer - start), np.float32) if after else None
    for module in after:
        width, columns = module.piece.shape[-1], module.piece.columns
        vector = read_part(tensors, _only(found, module), (width, 1), module)
        vector = module.piece.part.change.read(vector, head_dim)[:, 0]
        module.layer(outputs)[0, columns.start - start : columns.stop - start] = vector  # pyright: ignore[reportArgumentType]
    made = (None if part is None else jnp.asarray(part) for part in (inputs, outputs))
    return Scaled(None, *made, start=start)


def _is_forward(name: str, forward: str | Sequence[str]) -> bool:
    """Whether inputs of a module are multiplied, not its results, as peft judges it."""
    if isinstance(forward, str):
        try:
            return re.fullmatch(forward, name) is not None
        except re.error as error:
            raise ModelError(
                f"{CONFIG} has feedforward_modules={forward!r}, which is no regular expression ({error}): mend it, or "
                "give a list of names."
            ) from None
    return any(name.endswith(end) for end in forward)


def _only(found: Mapping[str, Mapping[str, str]], module: Module) -> str:
    if found[module.name].keys() != {"ia3_l"}:
        raise ModelError(f"{module.name} has {', '.join(found[module.name])} in an adapter of type IA3: it is damaged.")
    return found[module.name]["ia3_l"]


def _write_scaled(adapters: Mapping[str, Any], modules: Modules, tensors: dict[str, Array]) -> dict[str, Any]:
    chosen: dict[str, bool] = {}
    for path, leaf in adapters.items():
        if leaf.inputs is not None and leaf.outputs is not None:
            raise ModelError(f"{path} has factors of its inputs and of its results, and peft has one of the two.")
        for module in modules.by_path[path]:
            columns, name = module.piece.columns, f"{ROOT}{module.name}.ia3_l"
            if leaf.inputs is not None:
                tensors[name] = np.ascontiguousarray(module.layer(np.asarray(leaf.inputs)).T)
            elif columns.stop > leaf.start:
                factors = np.ones(columns.stop, np.float32)
                factors[leaf.start :] = module.layer(np.asarray(leaf.outputs))[0, : columns.stop - leaf.start]
                tensors[name] = module.piece.part.change.write(factors[columns][:, None], modules.head_dim)
            else:
                continue
            chosen[module.name] = leaf.inputs is not None
    entries = modules.entries(chosen)
    return {
        "peft_type": "IA3",
        "target_modules": sorted(entries),
        "feedforward_modules": sorted(entry for entry, forward in entries.items() if forward),
        "init_ia3_weights": True,
    }
