"""Quantised matrices in other people's files: compressed-tensors' `pack-quantized` and GPTQ's own layout, both ways.

Written are the codes and scales that a matrix has; what is read becomes floating point numbers, one matrix at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from cramjax.errors import ModelError
from cramjax.formats.bits import packed, unpacked_codes
from cramjax.formats.codes import Matrix, Scheme
from cramjax.formats.tensors import Output, Tensors, whole
from cramjax.kernels.packed import Quantised

Layout = Literal["compressed-tensors", "gptq"]
BITS = (2, 3, 4, 8)


def scheme_of(leaves: Mapping[str, Any]) -> Scheme:
    """How a model's matrices are quantised.

    Args:
        leaves: its parameters by path.

    Raises:
        ModelError: they are packed in another way, or not all alike.
    """
    found: dict[Scheme, str] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Quantised):
            group = None if leaf.scale.shape[-2] == 1 else leaf.group
            found.setdefault(Scheme(leaf.bits, group, leaf.zero is None), path)
    if len(found) != 1:
        said = "; ".join(f"{path}: {scheme}" for scheme, path in found.items()) or "none is of 8, 4, 3 or 2 bits"
        raise ModelError(
            f"these formats have all quantised matrices of one kind, and here there are {len(found)} ({said}): "
            "compress the model with one --bits and --group for all."
        )
    return next(iter(found))


def outputs_of(
    layout: Layout, scheme: Scheme, name: str, shape: tuple[int, ...], make: Callable[[], Matrix]
) -> list[Output]:
    """The tensors of a matrix.

    Args:
        layout: of the file.
        scheme: how it is quantised.
        name: of its weight.
        shape: (out, in).
        make: the matrix.

    Raises:
        ModelError: the layout cannot hold it.
    """
    stem = name.removesuffix("weight")
    out, inner = shape
    groups = 1 if scheme.group is None else inner // scheme.group
    write = {"compressed-tensors": _compressed, "gptq": _gptq}[layout]
    return write(scheme, stem, (out, inner, groups), make)


def _compressed(scheme: Scheme, stem: str, sizes: tuple[int, int, int], make: Callable[[], Matrix]) -> list[Output]:
    out, inner, groups = sizes
    bits = scheme.bits
    outputs = [
        whole(f"{stem}weight_packed", (out, -(-inner * bits // 32)), np.int32, lambda: packed(make().codes, bits)),
        whole(f"{stem}weight_scale", (out, groups), np.float32, lambda: make().scale.astype(np.float32)),
        whole(f"{stem}weight_shape", (2,), np.int64, lambda: np.asarray([out, inner])),
    ]
    if not scheme.symmetric:
        shape = (-(-out * bits // 32), groups)
        outputs.append(
            whole(f"{stem}weight_zero_point", shape, np.int32, lambda: packed(_whole(make().zero, stem).T, bits).T)
        )
    return outputs


def _gptq(scheme: Scheme, stem: str, sizes: tuple[int, int, int], make: Callable[[], Matrix]) -> list[Output]:
    out, inner, groups = sizes
    bits = scheme.bits
    if inner * bits % 32 or out * bits % 32:
        raise ModelError(
            f"{stem}weight: GPTQ's layout has whole words of 32 bits, and {inner} inputs and {out} outputs of {bits} "
            "bits have not: use --format compressed-tensors."
        )

    def scales() -> np.ndarray:
        exact = make().scale.astype(np.float32)
        half = exact.astype(np.float16)
        if (half.astype(np.float32) != exact).any():
            raise ModelError(
                f"{stem}weight: GPTQ's layout has scales in float16, in which those here are not exact: use --format "
                "compressed-tensors, or compress the model with --scale_dtype=bfloat16."
            )
        return half.T

    group = scheme.group or inner
    return [
        whole(f"{stem}qweight", (inner * bits // 32, out), np.int32, lambda: packed(make().codes, bits).T),
        whole(f"{stem}qzeros", (groups, out * bits // 32), np.int32, lambda: packed(_whole(make().zero, stem).T, bits)),
        whole(f"{stem}scales", (groups, out), np.float16, scales),
        whole(f"{stem}g_idx", (inner,), np.int32, lambda: np.arange(inner, dtype=np.int32) // group),
    ]


def _whole(zero: np.ndarray, stem: str) -> np.ndarray:
    """Codes of 0 as these formats have them."""
    codes = np.rint(zero)
    if (np.abs(codes - zero) > 1e-4).any() or (codes < 0).any():
        raise ModelError(
            f"{stem}weight: this layout has whole numbers for zeros, and those here lie between (of HQQ, or of a GGUF "
            "file): use --format gguf, or --dequantise."
        )
    return codes.astype(np.uint8)


def quantization_config(layout: Layout, scheme: Scheme) -> dict[str, Any]:
    """What `config.json` says of it."""
    if layout == "gptq":
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group or -1,
            "desc_act": False,
            "sym": scheme.symmetric,
            "checkpoint_format": "gptq_v2",  # zeros as they are; of the first version, each is one less
        }
    strategy = "channel" if scheme.group is None else "group"
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


class Reader(Protocol):
    """Reads the matrices of one layout."""

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """What the names of a matrix's tensors end with; the first tells that there is one."""
        ...

    def shape(self, tensors: Tensors, stem: str) -> tuple[int, int]:
        """(out, in)."""
        ...

    def matrix(self, tensors: Tensors, stem: str) -> tuple[Matrix, np.ndarray]:
        """The codes, and the group that each input is of."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether 0 is the middle code throughout."""
        ...


@dataclass(frozen=True)
class DequantisedTensors:
    """Tensors of files with the weights of quantised matrices, float32, in the place of their codes and scales."""

    tensors: Tensors
    reader: Reader

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        parts = {stem + part for stem in self._stems.values() for part in self.reader.parts}
        return [*(name for name in self.tensors.names if name not in parts), *self._stems]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one."""
        stem = self._stems.get(name)
        return self.tensors.shape(name) if stem is None else self.reader.shape(self.tensors, stem)

    def dtype(self, name: str) -> np.dtype:
        """Of one."""
        return np.dtype(np.float32) if name in self._stems else self.tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """One array, in memory of its own."""
        stem = self._stems.get(name)
        if stem is None:
            return self.tensors.read(name)
        found, groups = self._found(name)
        return (found.codes.astype(np.float32) - found.zero[:, groups]) * found.scale[:, groups]

    def scheme(self, name: str) -> Scheme | None:
        """How one is quantised; None: it is not, or its groups are not of neighbours."""
        if name not in self._stems:
            return None
        found, groups = self._found(name)
        count, inner = found.scale.shape[1], len(groups)
        if inner % count or (groups != np.arange(inner) // (inner // count)).any():
            return None
        middle = 2 ** (self.reader.bits - 1)
        symmetric = self.reader.symmetric and bool((found.zero == middle).all())
        return Scheme(self.reader.bits, None if count == 1 else inner // count, symmetric)

    def matrix(self, name: str) -> Matrix:
        """One that has a scheme."""
        return self._found(name)[0]

    def _found(self, name: str) -> tuple[Matrix, np.ndarray]:
        try:
            found, groups = self.reader.matrix(self.tensors, self._stems[name])
            if found.zero.shape != found.scale.shape or groups.shape != found.codes.shape[1:]:
                raise ValueError(f"scales are {found.scale.shape}, zeros {found.zero.shape}")
            if len(found.scale) != len(found.codes) or groups.min() < 0 or groups.max() >= found.scale.shape[1]:
                raise ValueError(f"scales are {found.scale.shape} for codes of {found.codes.shape}")
        except (KeyError, ValueError, IndexError) as error:
            raise ModelError(
                f"the codes and scales of {name} do not fit one another ({error}): copy the model again."
            ) from None
        return found, groups

    @cached_property
    def _stems(self) -> dict[str, str]:
        first = self.reader.parts[0]
        found = [name.removesuffix(first) for name in self.tensors.names if name.endswith("." + first)]
        return {f"{stem}weight": stem for stem in found}


@dataclass(frozen=True)
class _Compressed:
    bits: int
    symmetric: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx"))

    def shape(self, tensors: Tensors, stem: str) -> tuple[int, int]:
        out, inner = tensors.read(f"{stem}weight_shape").tolist()
        return int(out), int(inner)

    def matrix(self, tensors: Tensors, stem: str) -> tuple[Matrix, np.ndarray]:
        out, inner = self.shape(tensors, stem)
        codes = unpacked_codes(tensors.read(f"{stem}weight_packed"), self.bits, inner)
        scale = tensors.read(f"{stem}weight_scale").astype(np.float32)
        zero = np.full(scale.shape, 2 ** (self.bits - 1), np.float32)
        if not self.symmetric:
            zero = _zeros(tensors.read(f"{stem}weight_zero_point"), self.bits, out).astype(np.float32)
        groups = np.arange(inner) * scale.shape[1] // inner
        if f"{stem}weight_g_idx" in tensors.names:
            groups = tensors.read(f"{stem}weight_g_idx")
        return Matrix(codes, scale, zero), groups


def _zeros(words: np.ndarray, bits: int, out: int) -> np.ndarray:
    """Packed along the outputs."""
    return unpacked_codes(np.ascontiguousarray(words.T), bits, out).T


@dataclass(frozen=True)
class _Gptq:
    bits: int
    symmetric: bool
    later: bool
    """Whether zeros are stored as they are; else each is one less."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def shape(self, tensors: Tensors, stem: str) -> tuple[int, int]:
        words, out = tensors.shape(f"{stem}qweight")
        return int(out), int(words) * 32 // self.bits

    def matrix(self, tensors: Tensors, stem: str) -> tuple[Matrix, np.ndarray]:
        out, inner = self.shape(tensors, stem)
        codes = unpacked_codes(np.ascontiguousarray(tensors.read(f"{stem}qweight").T), self.bits, inner)
        scale = tensors.read(f"{stem}scales").astype(np.float32).T
        zero = unpacked_codes(tensors.read(f"{stem}qzeros"), self.bits, out).T.astype(np.int32)
        if not self._as_they_are(zero):
            zero = zero + 1
        groups = np.arange(inner) * scale.shape[1] // inner
        if f"{stem}g_idx" in tensors.names:
            groups = tensors.read(f"{stem}g_idx")
        return Matrix(codes, scale, zero.astype(np.float32)), groups

    def _as_they_are(self, zero: np.ndarray) -> bool:
        # Some wrote the second version under the first one's name: where 0 is the middle code, it tells itself.
        middle = 2 ** (self.bits - 1)
        if self.symmetric and (zero == zero.flat[0]).all() and zero.flat[0] in (middle - 1, middle):
            return bool(zero.flat[0] == middle)
        return self.later


def reader_of(config: Mapping[str, Any]) -> Reader:
    """What reads the matrices of a quantised model.

    Args:
        config: `quantization_config` of its `config.json`.

    Raises:
        ModelError: it is quantised in a way that is not known here.
    """
    method = config.get("quant_method")
    try:
        if method == "gptq":
            bits, symmetric = int(config["bits"]), bool(config.get("sym", True))
            reader = _Gptq(bits, symmetric, config.get("checkpoint_format") == "gptq_v2")
        elif method == "compressed-tensors" and config.get("format") == "pack-quantized":
            groups = list(config["config_groups"].values())
            kinds = {(int(group["weights"]["num_bits"]), bool(group["weights"]["symmetric"])) for group in groups}
            if len(kinds) != 1 or any(group.get("input_activations") for group in groups):
                raise ModelError(f"{_REFUSED} its matrices are of several kinds, or its activations quantised too.")
            reader = _Compressed(*next(iter(kinds)))
        else:
            what = f"{method}, format {config.get('format')}" if method == "compressed-tensors" else method
            raise ModelError(
                f"{_REFUSED} quant_method is {what}, and read are gptq and compressed-tensors' pack-quantized."
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{_REFUSED} quantization_config is damaged ({error!r}).") from None
    if reader.bits not in BITS:
        raise ModelError(f"{_REFUSED} its codes have {reader.bits} bits, and read are {', '.join(map(str, BITS))}.")
    return reader


_REFUSED = "the model is quantised, and cannot be read so; give its original, in float32, float16 or bfloat16:"
