"""What batches cost: seconds by a buffer's shape."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cramjax.language_model import LanguageModel
from cramjax.model import count_parameters
from cramjax.serve.lengths.shapes import Shape, shape_of

_CALL = 0.02
"""Seconds that a batch takes beside its products: most of them a share of its program's compilation."""
_SPEED = 1e11
"""FLOP/s of products; only what it makes of a batch beside `_CALL` matters."""
_PAIRS = 4.0
"""How much slower the products of attention are, with their softmax: few tokens long and a head wide."""


@dataclass(frozen=True)
class Costs:
    """Seconds of batches under one model."""

    context: int
    """Most tokens of a text."""
    place_flops: float
    """FLOPs of a place in all products but attention's."""
    pair_flops: float
    """FLOPs of a pair of query and key in all layers."""

    def of_shape(self, shape: Shape) -> Float[np.ndarray, "*batches"]:
        """Seconds of a buffer of a shape."""
        products = self.place_flops * np.asarray(shape.places) + _PAIRS * self.pair_flops * np.asarray(shape.pairs)
        return _CALL + products / _SPEED

    def seconds(
        self,
        longest: Int[np.ndarray, "*batches"],
        texts: Int[np.ndarray, "*batches"],
        tokens: Int[np.ndarray, "*batches"],
    ) -> Float[np.ndarray, "*batches"]:
        """Seconds of batches; infinity for several texts that are too many."""
        shape = shape_of(longest, texts, tokens, self.context)
        return np.where(shape.fits | (np.asarray(texts) == 1), self.of_shape(shape), np.inf)


def costs_of(model: LanguageModel) -> Costs:
    """The costs of a model's batches, by its FLOPs."""
    own, sizes = model.model, model.model.sizes
    in_blocks = count_parameters(model.config, own.vocab_size, own.sequence_length).blocks
    pair = 4 * model.config.layers * sizes.heads * sizes.head_dim
    return Costs(model.context, 2.0 * in_blocks, float(pair))
