"""The one table of GPUs: what their data sheets say, for utilisation, for plans, and for compiling ahead of time.

Sheets: NVIDIA's product briefs and data sheets of each card (Tesla T4, V100, A100, L4, L40S, H100, H200, HGX B200; RTX
A4000, A5000, A6000, 6000 Ada) and the white papers of the Turing, Ampere GA102, Ada and Blackwell GeForce cards; counts
of multiprocessors' registers, threads and shared memory from the CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability". No number here is measured, but for memory: what the driver reports, which is less than the
sheet's where error correction takes a part.
"""

import difflib
import re
from dataclasses import dataclass

from cramjax.errors import ConfigError

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A card, as its vendor's data sheet describes it."""

    name: str
    """As the driver reports it."""
    chip: str
    """The part of the name that tells it from other cards; variants by memory share it."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    cores: int
    """Streaming multiprocessors."""
    lanes: int
    """float32 units of a multiprocessor."""
    threads: int
    """Most threads resident on a multiprocessor."""
    shared_memory: int
    """Bytes of shared memory of a multiprocessor; a block of threads may ask for 1024 fewer."""
    l2_cache: int
    """Bytes."""
    memory: int
    """Bytes of device memory."""
    bandwidth: float
    """Bytes per second from device memory."""
    clock: float
    """Boost clock, in Hz."""
    tensor_flops: float
    """Dense tensor-core FLOP/s in bfloat16 (float16 where there is no bfloat16), summed in float32."""
    host_bandwidth: float
    """Bytes per second from or to host memory, each way: PCIe, 16 lanes."""

    @property
    def float32_flops(self) -> float:
        """FLOP/s of plain float32: a multiply-add per unit and cycle."""
        return 2.0 * self.cores * self.lanes * self.clock

    @property
    def has_bfloat16(self) -> bool:
        """Whether its tensor cores take bfloat16; elsewhere XLA's products of it run in float32."""
        return self.capability >= (8, 0)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of products with operands of a precision.

        Args:
            dtype: `float32` or `bfloat16`.
        """
        return self.tensor_flops if dtype == "bfloat16" and self.has_bfloat16 else self.float32_flops


_PCIE3, _PCIE4, _PCIE5 = 15.75e9, 31.5e9, 63e9

# name, chip, capability, SMs, lanes, threads, shared memory, L2, memory, bandwidth, clock, tensor FLOP/s, PCIe
GPUS = {
    "t4": Gpu(
        "Tesla T4", "T4", (7, 5), 40, 64, 1024, 64 * _KIB, 4 * _MIB, 15360 * _MIB, 320e9, 1.59e9, 65e12, _PCIE3
    ),
    "v100-16gb": Gpu(
        "Tesla V100-SXM2-16GB", "V100", (7, 0), 80, 64, 2048, 96 * _KIB, 6 * _MIB, 16384 * _MIB, 900e9, 1.53e9, 125e12,
        _PCIE3,
    ),
    "v100-32gb": Gpu(
        "Tesla V100-SXM2-32GB", "V100", (7, 0), 80, 64, 2048, 96 * _KIB, 6 * _MIB, 32768 * _MIB, 900e9, 1.53e9, 125e12,
        _PCIE3,
    ),
    "rtx-2080-ti": Gpu(
        "NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti", (7, 5), 68, 64, 1024, 64 * _KIB, 5632 * _KIB, 11264 * _MIB, 616e9,
        1.545e9, 54e12, _PCIE3,
    ),
    "rtx-3090": Gpu(
        "NVIDIA GeForce RTX 3090", "RTX 3090", (8, 6), 82, 128, 1536, 100 * _KIB, 6 * _MIB, 24576 * _MIB, 936e9,
        1.695e9, 71e12, _PCIE4,
    ),
    "rtx-4090": Gpu(
        "NVIDIA GeForce RTX 4090", "RTX 4090", (8, 9), 128, 128, 1536, 100 * _KIB, 72 * _MIB, 24564 * _MIB, 1008e9,
        2.52e9, 165e12, _PCIE4,
    ),
    "rtx-5090": Gpu(
        "NVIDIA GeForce RTX 5090", "RTX 5090", (12, 0), 170, 128, 1536, 100 * _KIB, 96 * _MIB, 32607 * _MIB, 1792e9,
        2.407e9, 210e12, _PCIE5,
    ),
    "a4000": Gpu(
        "NVIDIA RTX A4000", "RTX A4000", (8, 6), 48, 128, 1536, 100 * _KIB, 4 * _MIB, 16376 * _MIB, 448e9, 1.56e9,
        77e12, _PCIE4,
    ),
    "a5000": Gpu(
        "NVIDIA RTX A5000", "RTX A5000", (8, 6), 64, 128, 1536, 100 * _KIB, 6 * _MIB, 24564 * _MIB, 768e9, 1.695e9,
        111e12, _PCIE4,
    ),
    "a6000": Gpu(
        "NVIDIA RTX A6000", "RTX A6000", (8, 6), 84, 128, 1536, 100 * _KIB, 6 * _MIB, 49140 * _MIB, 768e9, 1.80e9,
        155e12, _PCIE4,
    ),
    "6000-ada": Gpu(
        "NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", (8, 9), 142, 128, 1536, 100 * _KIB, 96 * _MIB, 49140 * _MIB,
        960e9, 2.505e9, 364e12, _PCIE4,
    ),
    "l4": Gpu(
        "NVIDIA L4", "L4", (8, 9), 58, 128, 1536, 100 * _KIB, 48 * _MIB, 23034 * _MIB, 300e9, 2.04e9, 121e12, _PCIE4
    ),
    "l40s": Gpu(
        "NVIDIA L40S", "L40S", (8, 9), 142, 128, 1536, 100 * _KIB, 96 * _MIB, 46068 * _MIB, 864e9, 2.52e9, 362e12,
        _PCIE4,
    ),
    "a100-40gb": Gpu(
        "NVIDIA A100-SXM4-40GB", "A100", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 40960 * _MIB, 1555e9, 1.41e9,
        312e12, _PCIE4,
    ),
    "a100-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB", "A100", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 81920 * _MIB, 2039e9, 1.41e9,
        312e12, _PCIE4,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", "H100", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 81559 * _MIB, 3350e9, 1.98e9,
        989e12, _PCIE5,
    ),
    "h100-pcie": Gpu(
        "NVIDIA H100 PCIe", "H100 PCIe", (9, 0), 114, 128, 2048, 228 * _KIB, 50 * _MIB, 81559 * _MIB, 2000e9, 1.755e9,
        756e12, _PCIE5,
    ),
    "h200": Gpu(
        "NVIDIA H200", "H200", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 143771 * _MIB, 4800e9, 1.98e9, 989e12,
        _PCIE5,
    ),
    "b200": Gpu(
        "NVIDIA B200", "B200", (10, 0), 148, 128, 2048, 228 * _KIB, 126 * _MIB, 183359 * _MIB, 8000e9, 1.965e9,
        2250e12, _PCIE5,
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """The card that a user means: a key of `GPUS`, or its name more or less: `4090`, `RTX 4090`, `a100-80`.

    Raises:
        ConfigError: none is called so, or several are.
    """
    wanted = _plain(name)
    exact = [gpu for key, gpu in GPUS.items() if wanted in (_plain(key), _plain(gpu.name))]
    if exact:
        return exact[0]
    variants = [key for key, gpu in GPUS.items() if wanted == _plain(gpu.chip)]
    if variants:
        raise ConfigError(f"There are several devices {name!r}: say which of {', '.join(variants)}.")
    plain = {_plain(key): key for key in GPUS}
    near = [plain[match] for match in difflib.get_close_matches(wanted, plain, n=4, cutoff=0.5)]
    near += [key for short, key in plain.items() if wanted and key not in near and (short in wanted or wanted in short)]
    hint = f": did you mean {' or '.join(near)}?" if near else "."
    raise ConfigError(f"There is no device {name!r} in the table{hint} It has cpu, {', '.join(GPUS)}.")


def gpu_of_kind(kind: str) -> Gpu | None:
    """The card that a driver's name is of, such as JAX's `device_kind`; None where the table has none.

    Of variants by memory it is the one whose size is in the name, else the smallest.
    """
    found = [gpu for gpu in GPUS.values() if re.search(rf"(?<!\w){re.escape(gpu.chip)}(?![0-9A-Za-z])", kind)]
    if not found:
        return None
    longest = max(len(gpu.chip) for gpu in found)
    found = [gpu for gpu in found if len(gpu.chip) == longest]
    size = re.search(r"(\d+)GB", kind)
    return next((gpu for gpu in found if size and size.group(0) in gpu.name), found[0])


def _plain(name: str) -> str:
    """A name without what people leave out of it."""
    short = re.sub(r"[^a-z0-9]", "", name.lower())
    short = re.sub(r"^(nvidia)?(tesla)?(geforce)?(quadro)?(rtx|gtx)?", "", short)
    return re.sub(r"(generation|gb)$", "", short)
