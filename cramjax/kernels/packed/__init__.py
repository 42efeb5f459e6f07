"""Packed leaves: what stands in the place of matrices in fewer bytes, and how a model's are made, named and read."""

from cramjax.kernels.dense.packed import Packed, is_packed, unpacked
from cramjax.kernels.packed.model import pack
from cramjax.kernels.packed.names import from_arrays, to_arrays
from cramjax.kernels.packed.quantised import Quantised, quantise

__all__ = ["Packed", "Quantised", "from_arrays", "is_packed", "pack", "quantise", "to_arrays", "unpacked"]
