"""Cross entropy of a linear head: projection, softmax and loss in one, and its plain reference."""

from cramjax.kernels.cross_entropy.adaptive import Tail, adaptive_cross_entropy_sum, adaptive_logits, tail_shares
from cramjax.kernels.cross_entropy.api import CrossEntropySums, cross_entropy_sum
from cramjax.kernels.cross_entropy.reference import CrossEntropy, cross_entropy, head_logits

__all__ = [
    "CrossEntropy",
    "CrossEntropySums",
    "Tail",
    "adaptive_cross_entropy_sum",
    "adaptive_logits",
    "cross_entropy",
    "cross_entropy_sum",
    "head_logits",
    "tail_shares",
]
