"""What a trained model does: continue text, fill masks, embed texts."""

from cramjax.serve.beam import BeamSearch, Hypothesis, beam_search
from cramjax.serve.embed import embed, tokens_to_embed
from cramjax.serve.fill_mask import Candidate, Filling, fill_mask
from cramjax.serve.generate import Generation, generate, stream

__all__ = [
    "BeamSearch",
    "Candidate",
    "Filling",
    "Generation",
    "Hypothesis",
    "beam_search",
    "embed",
    "fill_mask",
    "generate",
    "stream",
    "tokens_to_embed",
]
