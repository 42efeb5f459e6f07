"""How models larger than memory are held while they generate, as a configuration. Imports no jax."""

import re
from dataclasses import dataclass
from typing import Literal

from cramjax.errors import ConfigError
from cramjax.ranges import Count

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


@dataclass(frozen=True)
class OffloadConfig:
    """What generation may take of device, host and disk, and how weights and cache are held."""

    device_memory: str | None = None
    """Memory of the device for weights, cache and all that is computed, such as 2GiB. On a CPU the device is this much
    of the memory. Default: what a GPU has free; a CPU needs a number."""
    host_memory: str = "0"
    """Memory of the host for what does not fit the device, such as 4GiB."""
    disk: str | None = None
    """A directory for what does not fit the host: cache, activations, and weights that are rounded, as long as it runs.
    Weights that are held as they are stored are read from the model's own files. Needed."""
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """How weights are held: `auto` is the precision that the model computes in; int8 and int4 round matrices to codes
    with a scale and a zero for 64 inputs (4.5 bits a weight); of int4, the head has 8 bits."""
    cache: Literal["auto", "int4"] = "auto"
    """How keys and values are held: `auto` is the precision that is computed in; int4 rounds them to codes of 4 bits in
    groups of 64."""
    batch: Count | None = None
    """Rows that are computed together. Default: chosen."""
    batches: Count | None = None
    """Batches that share one pass over the weights. Default: chosen."""


def parse_bytes(text: str, option: str) -> int:
    """Bytes as a user writes them: `2GiB`, `500MB`, `1048576`.

    Args:
        text: a number and a unit.
        option: for the message.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"{option} must be a number of bytes such as 2GiB, 500MB or 1048576, got {text!r}.")
    return int(float(found[1]) * units[found[2].lower()])
