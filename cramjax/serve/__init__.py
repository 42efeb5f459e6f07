"""What a trained model does: continue text, fill masks."""

from cramjax.serve.fill_mask import Candidate, Filling, fill_mask
from cramjax.serve.generate import Generation, generate

__all__ = ["Candidate", "Filling", "Generation", "fill_mask", "generate"]
