"""All blocks of a stack for a few new tokens, in one call on a CPU."""

from cramjax.kernels.walk.walk import ACTIVATIONS, MOST_TOKENS, Layers, Matrix, Rule, refusal, walk

__all__ = ["ACTIVATIONS", "MOST_TOKENS", "Layers", "Matrix", "Rule", "refusal", "walk"]
