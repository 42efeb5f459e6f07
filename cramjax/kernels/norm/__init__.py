"""LayerNorm and RMSNorm: one function, and one that also hands its input on, each with several implementations."""

from cramjax.kernels.norm.api import normalise, normalise_beside

__all__ = ["normalise", "normalise_beside"]
