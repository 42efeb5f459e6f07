"""Attention: one function, several implementations tried in order, each tested against the plain reference."""

from cramjax.kernels.attention.api import attention, implementations

__all__ = ["attention", "implementations"]
