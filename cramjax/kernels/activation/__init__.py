"""Non-linearities of the feed-forward layer: one function, several implementations."""

from cramjax.kernels.activation.api import activate

__all__ = ["activate"]
