"""Texts of any lengths in few batches: which go together, in buffers of what shape, at what cost, and when."""

from cramjax.serve.lengths.batches import Batch, Programs, batches, ragged_of
from cramjax.serve.lengths.costs import Costs, costs_of

__all__ = ["Batch", "Costs", "Programs", "batches", "costs_of", "ragged_of"]
