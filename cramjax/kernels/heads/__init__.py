"""What becomes of queries and keys between their product and attention: RMS norm per head, rotary positions."""

from cramjax.kernels.heads.api import normalise_and_rotate

__all__ = ["normalise_and_rotate"]
