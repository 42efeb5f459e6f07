"""Bytes of memory, by what they hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""What device memory holds. Logits and workspace take turns: workspace is what the backward pass of a block needs
beyond what the logits took before it."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, on each device and on the host."""

    by_kind: Mapping[str, int]
    """Device bytes of each of `KINDS`."""
    host_by_kind: Mapping[str, int] = field(default_factory=dict)
    """Host bytes that the step itself needs for all devices: of offloaded optimizer state, weights and activations."""

    @property
    def device_bytes(self) -> int:
        """All bytes of a device."""
        return sum(self.by_kind.values())

    @property
    def host_bytes(self) -> int:
        """All bytes of the host."""
        return sum(self.host_by_kind.values())
