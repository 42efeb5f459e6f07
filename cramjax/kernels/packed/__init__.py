"""Packed leaves: what stands in the place of matrices in fewer bytes or with an adapter, and how a model's are made,
named and read.
"""

from cramjax.kernels.dense.packed import Packed, is_adapter, is_packed, unpacked, without_adapters
from cramjax.kernels.packed.coded import Coded
from cramjax.kernels.packed.coded import read as read_coded
from cramjax.kernels.packed.coded import stack as stack_coded
from cramjax.kernels.packed.coded import write as write_coded
from cramjax.kernels.packed.floats import Float8, Microscaled, float8, float_refusal, microscaled
from cramjax.kernels.packed.low_rank import LowRank, column_lengths, low_rank
from cramjax.kernels.packed.merging import Merged, merge, with_factors_in_biases
from cramjax.kernels.packed.model import Kind, pack
from cramjax.kernels.packed.names import Settings, adapter_settings, from_arrays, on_base, to_arrays
from cramjax.kernels.packed.normal_float import NormalFloat, normal_float
from cramjax.kernels.packed.quantised import (
    Quantised,
    coded,
    quantisation_refusal,
    quantise,
    rounding_rows,
    without_rounding,
)
from cramjax.kernels.packed.scaled import Scaled, scaled
from cramjax.kernels.packed.streamed import Streamed, streams, table_of
from cramjax.kernels.packed.virtual import Prefixed, Prompted, Virtual, prefix_of, prompt_of

__all__ = [
    "Coded",
    "Float8",
    "Kind",
    "LowRank",
    "Merged",
    "Microscaled",
    "NormalFloat",
    "Packed",
    "Prefixed",
    "Prompted",
    "Quantised",
    "Scaled",
    "Settings",
    "Streamed",
    "Virtual",
    "adapter_settings",
    "coded",
    "column_lengths",
    "float8",
    "float_refusal",
    "from_arrays",
    "is_adapter",
    "is_packed",
    "low_rank",
    "merge",
    "microscaled",
    "normal_float",
    "on_base",
    "pack",
    "prefix_of",
    "prompt_of",
    "quantisation_refusal",
    "quantise",
    "read_coded",
    "rounding_rows",
    "scaled",
    "stack_coded",
    "streams",
    "table_of",
    "to_arrays",
    "unpacked",
    "with_factors_in_biases",
    "without_adapters",
    "without_rounding",
    "write_coded",
]
