"""Parameters as named arrays, and back: `blocks/mlp/up/kernel`, and of a packed one `blocks/mlp/up/kernel.q`, `.scale`,
of one with an adapter `blocks/mlp/up/kernel.base`, or `.base.q` and so on, and `.a`, `.b`.

What files hold. Arrays may be of any kind: on devices, in host memory, or shapes alone. What of an adapter is no array
(its scale) lies beside them, as settings.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from cramjax.errors import ModelError
from cramjax.kernels.dense.packed import Packed, is_adapter
from cramjax.kernels.packed.coded import Coded
from cramjax.kernels.packed.floats import MX_BLOCK, Float8, Microscaled
from cramjax.kernels.packed.low_rank import LowRank
from cramjax.kernels.packed.normal_float import SCALES, NormalFloat
from cramjax.kernels.packed.quantised import WORDS, Quantised, quantisation_refusal
from cramjax.kernels.packed.scaled import Scaled
from cramjax.kernels.packed.virtual import Prefixed, Prompted, Virtual

Settings = Mapping[str, Mapping[str, Any]]
"""What arrays do not tell of adapters, in JSON's types, by the path of the matrix that each is of."""


def to_arrays(params: PyTree) -> dict[str, Any]:
    """Every array of the parameters by name, in the tree's order.

    Args:
        params: nested dicts of arrays and packed leaves.
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def adapter_settings(params: PyTree) -> dict[str, dict[str, Any]]:
    """What arrays do not tell of the parameters' adapters and coded matrices: `from_arrays` reads them back with it."""
    return {_name(path): _settings(leaf) for path, leaf in _with_settings(params)}


def on_base(path: str, adapter: Any, base: Any) -> Packed:
    """An adapter without a base on the matrix that it is for.

    Raises:
        ModelError: it is no adapter, or of a matrix of another shape, or the matrix has one.
    """
    if not is_adapter(adapter):
        raise ModelError(f"{path} is no adapter, but a whole array: give the arrays of adapters alone.")
    if is_adapter(base):
        raise ModelError(f"{path} has an adapter already: merge it, or take the model without it.")
    made = replace(adapter, base=base)
    _check_shapes(path, made)
    return made


def from_arrays(arrays: Mapping[str, Any], settings: Settings | None = None) -> PyTree:
    """The parameters that `to_arrays` named.

    Args:
        arrays: by name.
        settings: of the adapters among them, from `adapter_settings`.

    Raises:
        ModelError: a name that is no parameter's, or parts that make no packed leaf.
    """
    params: dict[str, Any] = {}
    for path, leaf in _leaves(arrays, settings or {}).items():
        *above, last = path.split("/")
        place = params
        for key in above:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ModelError(f"{path} lies below a parameter: the file is damaged.")
        if not last or last in place:
            raise ModelError(f"{path!r} cannot be a parameter's name: the file is damaged.")
        place[last] = leaf
    return params


def _leaves(arrays: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Arrays and packed leaves by path."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        place, steps = nested, name.split(".")
        for depth, step in enumerate(steps[:-1], start=1):
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise _both(".".join(steps[:depth]))
        if steps[-1] in place:
            raise _both(name)
        place[steps[-1]] = array
    left = dict(settings)
    leaves = {path: _leaf(path, own, left) if isinstance(own, dict) else own for path, own in nested.items()}
    if left:
        raise ModelError(f"{', '.join(left)}: settings of adapters that have no arrays; the file is damaged.")
    return leaves


def _both(name: str) -> ModelError:
    return ModelError(f"{name} is there both as an array and in parts: the file is damaged.")


def _leaf(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> Packed:
    """A packed leaf of its parts, which may be packed in turn; its settings are taken out of those of all."""
    made = {name: _leaf(f"{path}.{name}", x, settings) if isinstance(x, dict) else x for name, x in parts.items()}
    for needed, others, make in _KINDS:
        if needed <= set(made) <= needed | others:
            return make(path, made, settings)
    raise _strangers(path, made)


def _strangers(path: str, parts: Mapping[str, Any]) -> ModelError:
    found = ", ".join(f"{path}.{name} ({array.dtype})" for name, array in sorted(parts.items()))
    return ModelError(
        f"{found}: a quantised matrix has .q (int8, uint8, uint16 or uint32), .scale and perhaps .zero; one of NF4 "
        ".nf4 (uint8) and .absmax, which is uint8 with .absmax_scale and .absmax_mean; one of FP8 .fp8 (uint8) and "
        ".scale; one of MXFP4 .mxfp4 and .exponent (uint8); a ternary one in words .words, .starts and .levels; one "
        "with an adapter of low rank .a, .b and perhaps .magnitude; one with factors .inputs or .outputs; one with "
        "virtual tokens .rows, or .keys "
        "and .values; all float32, and perhaps .base; and no others."
    )


def _quantised(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> Quantised:
    """How many bits a code has, its type says."""
    own = settings.pop(path, {})
    if own not in ({}, {"rounds": True}):
        raise ModelError(f"{path}: a quantised matrix may have the setting `rounds`, true; got {dict(own)}.")
    bits = {str(jnp.dtype(word)): bits for bits, word in WORDS.items()}.get(str(parts["q"].dtype))
    if bits is None:
        raise _strangers(path, parts)
    leaf = Quantised(parts["q"], parts["scale"], parts.get("zero"), bits, bool(own))
    *lead, inner, outer = leaf.shape if len(parts["q"].shape) > 1 else (0, 0)
    wanted = (*lead, max(1, parts["scale"].shape[-2] if len(parts["scale"].shape) > 1 else 1), outer)
    if (
        inner % wanted[-2]
        or any(tuple(part.shape) != wanted for name, part in parts.items() if name != "q")
        or quantisation_refusal(leaf.shape, bits, inner // wanted[-2])
        or (bits == 3 and parts["q"].shape[-2] % 3)
    ):
        raise _misfits(path, parts)
    return leaf


def _normal_float(path: str, parts: Mapping[str, Any], _: Any) -> NormalFloat:
    leaf = NormalFloat(**parts)
    types = {"nf4": "uint8", "absmax": "uint8" if leaf.double else "float32"}
    if any(str(part.dtype) != types.get(name, "float32") for name, part in parts.items()):
        raise _strangers(path, parts)
    if min(len(part.shape) for part in parts.values()) < 2:
        raise _misfits(path, parts)
    *lead, inner, outer = leaf.shape
    blocks = leaf.absmax.shape[-2]
    wanted = {
        "nf4": (*lead, inner // 2, outer),
        "absmax": (*lead, blocks, outer),
        "absmax_scale": (*lead, 1, -(-blocks * outer // SCALES)),
        "absmax_mean": (*lead, 1, 1),
    }
    if not blocks or inner % blocks or any(tuple(part.shape) != wanted[name] for name, part in parts.items()):
        raise _misfits(path, parts)
    return leaf


def _float8(path: str, parts: Mapping[str, Any], _: Any) -> Float8:
    if str(parts["fp8"].dtype) != "uint8" or str(jnp.dtype(parts["scale"].dtype)) not in ("float32", "bfloat16"):
        raise _strangers(path, parts)
    leaf = Float8(**parts)
    *lead, inner, outer = leaf.shape if len(leaf.shape) > 1 else (0, 0)
    groups = leaf.pieces if len(leaf.scale.shape) > 1 else 0
    if not groups or inner % groups or tuple(leaf.scale.shape) != (*lead, groups, outer):
        raise _misfits(path, parts)
    return leaf


def _microscaled(path: str, parts: Mapping[str, Any], _: Any) -> Microscaled:
    if any(str(part.dtype) != "uint8" for part in parts.values()):
        raise _strangers(path, parts)
    leaf = Microscaled(**parts)
    *lead, inner, outer = leaf.shape if len(leaf.mxfp4.shape) > 1 else (0, 0)
    if not inner or inner % MX_BLOCK or tuple(leaf.exponent.shape) != (*lead, inner // MX_BLOCK, outer):
        raise _misfits(path, parts)
    return leaf


def _coded(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> Coded:
    own = settings.pop(path, {})
    try:
        inner = int(own["inner"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: a ternary matrix in words needs the setting `inner`, got {dict(own)}.") from None
    types = {"words": "uint16", "starts": "int32", "levels": "bfloat16"}
    if any(str(jnp.dtype(part.dtype)) != types[name] for name, part in parts.items()):
        raise _strangers(path, parts)
    leaf = Coded(parts["words"], parts["starts"], parts["levels"], inner)
    *lead, two, outer = leaf.levels.shape if len(leaf.levels.shape) > 1 else (0, 0)
    wanted = {"words": (*lead, 1, leaf.words.shape[-1]), "starts": (*lead, 1, outer + 1)}
    if two != 2 or inner < 1 or any(tuple(parts[name].shape) != shape for name, shape in wanted.items()):
        raise _misfits(path, parts)
    return leaf


def _low_rank(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> LowRank:
    own = settings.pop(path, {})
    try:
        scale, widths = float(own["scale"]), tuple(int(width) for width in own["widths"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"{path}: an adapter of low rank needs the settings `scale` and `widths`, got {dict(own)}."
        ) from None
    leaf = LowRank(parts.get("base"), parts["a"], parts["b"], parts.get("magnitude"), scale, widths)
    _check_shapes(path, leaf)
    return leaf


def _scaled(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> Scaled:
    own = settings.pop(path, {})
    try:
        start = int(own["start"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: factors need the setting `start`, got {dict(own)}.") from None
    leaf = Scaled(parts.get("base"), parts.get("inputs"), parts.get("outputs"), start)
    _check_shapes(path, leaf)
    return leaf


def _virtual(kind: Any) -> Any:
    """What makes a leaf of virtual tokens of its parts."""

    def make(path: str, parts: Mapping[str, Any], settings: dict[str, Mapping[str, Any]]) -> Virtual:
        settings.pop(path, None)
        leaf = kind(**parts)
        _check_shapes(path, leaf)
        return leaf

    return make


def _check_shapes(path: str, leaf: Any) -> None:
    """Refuse an adapter whose parts do not fit one another, or its base."""
    own = {name: part for name in leaf.trained if (part := getattr(leaf, name)) is not None}
    if any(str(part.dtype) != "float32" for part in own.values()):
        raise _strangers(path, own)
    if empty := [name for name, part in own.items() if 0 in part.shape]:
        raise ModelError(
            f"{path}.{empty[0]} is empty, as adapters are that were saved from the shards of ZeRO-3: gather it before "
            "it is saved."
        )
    wide = min(len(part.shape) for part in own.values()) > 1
    shapes: Any = {Scaled: _scaled_shapes, Prompted: _virtual_shapes, Prefixed: _virtual_shapes}
    wanted = shapes.get(type(leaf), _low_rank_shapes)(leaf) if wide else None
    if wanted is None or any(tuple(part.shape) != wanted[name] for name, part in own.items()):
        raise _misfits(path, own if leaf.base is None else {"base": leaf.base, **own})


def _low_rank_shapes(leaf: LowRank) -> dict[str, tuple[int, ...]] | None:
    """Shapes of an adapter's parts, on its base or by themselves; None: no base has such."""
    *lead, inner, outer = leaf.shape
    if leaf.widths and sum(leaf.widths) != outer:
        return None
    return {
        "a": (*lead, inner, leaf.parts * leaf.rank),
        "b": (*lead, leaf.rank, outer),
        "magnitude": (*lead, 1, outer),
    }


def _scaled_shapes(leaf: Scaled) -> dict[str, tuple[int, ...]] | None:
    """As `_low_rank_shapes`. By themselves, the two vectors are of any length."""
    if leaf.base is not None:
        *lead, inner, outer = leaf.shape
    else:
        *lead, inner, _ = leaf.outputs.shape if leaf.inputs is None else leaf.inputs.shape
        outer = leaf.start + (1 if leaf.outputs is None else leaf.outputs.shape[-1])
    return {"inputs": (*lead, inner, 1), "outputs": (*lead, 1, outer - leaf.start)}


def _virtual_shapes(leaf: Virtual) -> dict[str, tuple[int, ...]]:
    """As `_low_rank_shapes`. How many keys and values there are for a token, the projections alone do not say."""
    own = tuple(getattr(leaf, leaf.trained[0]).shape)
    if leaf.base is None:
        return {name: own for name in leaf.trained}
    *lead, inner, outer = leaf.shape
    width = inner
    if isinstance(leaf, Prompted):
        width = outer
    elif own[-1] < outer and (outer - 2 * own[-1]) % own[-1] == 0:  # a group of queries has one key
        width = own[-1]
    return {name: (*lead, own[-2], width) for name in leaf.trained}


def _settings(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Virtual):
        return {}
    if isinstance(leaf, Coded):
        return {"inner": leaf.inner}
    if isinstance(leaf, Quantised):
        return {"rounds": True}
    if isinstance(leaf, Scaled):
        return {"start": leaf.start}
    return {"scale": leaf.scale, "widths": list(leaf.widths)}


_KINDS: tuple[tuple[set[str], set[str], Any], ...] = (
    ({"q", "scale"}, {"zero"}, _quantised),
    ({"nf4", "absmax"}, set(), _normal_float),
    ({"nf4", "absmax", "absmax_scale", "absmax_mean"}, set(), _normal_float),
    ({"fp8", "scale"}, set(), _float8),
    ({"mxfp4", "exponent"}, set(), _microscaled),
    ({"words", "starts", "levels"}, set(), _coded),
    ({"a", "b"}, {"base", "magnitude"}, _low_rank),
    ({"inputs"}, {"base", "outputs"}, _scaled),
    ({"outputs"}, {"base"}, _scaled),
    ({"rows"}, {"base"}, _virtual(Prompted)),
    ({"keys", "values"}, {"base"}, _virtual(Prefixed)),
)
"""Names of the parts that a kind of packed matrix has and may have, and what makes it of them."""


def _misfits(path: str, parts: Mapping[str, Any]) -> ModelError:
    shapes = ", ".join(f"{path}.{name} {tuple(array.shape)}" for name, array in sorted(parts.items()))
    return ModelError(f"{shapes}: these shapes do not fit one another; the file is damaged, or of another model.")


def _with_settings(params: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: is_adapter(leaf) or _has_some(leaf))
    found = [(path, leaf) for path, leaf in leaves if is_adapter(leaf) or _has_some(leaf)]
    # The base of an adapter has settings of its own.
    bases = [((*path, jax.tree_util.GetAttrKey("base")), leaf.base) for path, leaf in found if is_adapter(leaf)]
    return found + [(path, leaf) for path, leaf in bases if _has_some(leaf)]


def _has_some(leaf: Any) -> bool:
    """Whether a matrix has settings."""
    return isinstance(leaf, Coded) or (isinstance(leaf, Quantised) and leaf.rounds)


def _name(path: tuple[Any, ...]) -> str:
    steps = [jax.tree_util.keystr((step,), simple=True) for step in path]
    parts = [isinstance(step, jax.tree_util.GetAttrKey) for step in path]
    return "".join(f"{'.' if part else '/'}{step}" for step, part in zip(steps, parts, strict=True))[1:]
