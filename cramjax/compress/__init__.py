"""Models in fewer bits, or with weights set to 0: a walk over the stack that rewrites a block and feeds the next."""

from cramjax.compress.plan import CompressionPlan, plan_compression
from cramjax.compress.report import Compression
from cramjax.compress.run import compress_model, read_model

__all__ = ["Compression", "CompressionPlan", "compress_model", "plan_compression", "read_model"]
