"""What a training step does on a GPU, from its configuration alone: FLOPs, and bytes read and written.

The bytes are those of the kernels that a compiled step has (`benchmarks/step_bytes.py` counts them in its text).
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.model import count_parameters
from cramjax.model.counts import mean_pairs
from cramjax.model.pattern import widest_window
from cramjax.model.sizes import Sizes, sizes_of
from cramjax.planning.buffers import Step
from cramjax.planning.feed_forward import FeedForward
from cramjax.training.parts import flops_per_token

_FLOAT = 4


@dataclass(frozen=True)
class Work:
    """What one device does in a stretch of a step."""

    product_flops: float
    """Of matrix products outside attention."""
    product_bytes: float
    """That these products read and write."""
    attention_flops: float
    keys: float
    """That a query sees, in the mean."""
    passes: float
    """Bytes that all other kernels read and write."""


@dataclass(frozen=True)
class StepWork:
    """A step of a configuration, in work of one device."""

    config: RunConfig
    vocab_size: int
    compute_dtype: str
    gpu: Gpu
    devices: int

    @property
    def microbatch(self) -> Work:
        """Forward and backward pass of one microbatch."""
        return Work(
            product_flops=self.tokens * (self._flops - self._attention_flops),
            product_bytes=self.tokens * self._product_bytes_of_token + self._product_bytes_of_weights,
            attention_flops=self.tokens * self._attention_flops,
            keys=self._keys,
            passes=self.tokens * self._passes_of_token + self._passes_of_weights,
        )

    @property
    def update_passes(self) -> float:
        """Bytes of the optimizer's step on the device: the norm's pass, weights and gradient, each moment twice.

        Adafactor and AdaLomo read the gradient for their factors, and again for what these make of it.
        """
        again = 2 * self.config.optim.traits.factored
        return _FLOAT * ((4 + again) * self.parameters + 2 * self._step.moment_arrays)

    @property
    def newton_schulz_flops(self) -> float:
        """Of Muon's iterations, over all matrices."""
        model, steps, total = self.config.model, self.config.optim.newton_schulz_steps, 0.0
        sizes, inner = self._sizes, self._inner
        shapes = [(1, model.width, w) for w in sizes.qkv] + [(1, inner, model.width)]
        for times, width in self._made.layers:
            shapes += [*((times, model.width, w) for w in sizes.up_of(width)), (times, width, model.width)]
        for times, rows, columns in shapes:
            small, large = min(rows, columns), max(rows, columns)
            total += times * steps * (4.0 * small**2 * large + 2.0 * small**3)
        return model.layers * total

    @property
    def offloaded_bytes(self) -> float:
        """Bytes of a microbatch that `offload` sends to the host: the stream and the products, see `model/remat.py`."""
        model, sizes = self.config.model, self._sizes
        numbers = 2 * model.width + sum(sizes.qkv) + self._made.up + self._made.down
        return self.tokens * model.layers * self.compute_bytes * numbers

    @cached_property
    def parameters(self) -> int:
        """Numbers in the model."""
        return count_parameters(self.config.model, self.vocab_size, self.config.data.sequence_length).total

    @property
    def tokens(self) -> float:
        """Of a microbatch on one device."""
        return (self.config.batch.microbatch or self.config.batch.size) * self._length / self.devices

    @property
    def compute_bytes(self) -> int:
        """Of a number among the activations."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def unrolled(self) -> bool:
        """Whether the stack is walked without a loop."""
        return self._step.unrolled

    # ---- FLOPs

    @cached_property
    def _flops(self) -> float:
        """FLOPs done for each token: the model's, and those of what the backward pass computes again."""
        total, again = flops_per_token(self.config, self.vocab_size), 0.0
        if self.config.train.remat == "full":
            deeper = dataclasses.replace(
                self.config, model=dataclasses.replace(self.config.model, layers=2 * self.config.model.layers)
            )
            again = (flops_per_token(deeper, self.vocab_size) - total) / 3
        elif self.config.train.remat != "none":
            again = self._attention_model_flops / 3
        return total / 3 + self._walks * (2 / 3 * total + again)

    @property
    def _attention_flops(self) -> float:
        again = self.config.train.remat != "none"
        return self._attention_model_flops * (1 + self._walks * (2 + again)) / 3

    @property
    def _attention_model_flops(self) -> float:
        return 12.0 * self.config.model.layers * self._keys * self._inner

    @property
    def _keys(self) -> float:
        causal = self.config.objective.causal
        return mean_pairs(self.config.model, self._length, causal=causal)

    @property
    def _walks(self) -> int:
        """Backward passes: LOMO's clipping walks back once more, for the norm alone."""
        return 2 if self.config.optim.traits.clips_by_a_walk and self.config.optim.clip is not None else 1

    # ---- bytes of products: operands and results

    @property
    def _product_bytes_of_token(self) -> float:
        model, size = self.config.model, self.compute_bytes
        queries, keys, values = self._sizes.qkv
        turned = model.qk_norm or model.positions == "rotary"
        first = (queries + keys, values) if turned else (queries, keys, values)
        ends = sum(model.width + columns for columns in first)
        ends += (
            self._inner
            + model.width
            + self._made.rows * model.width
            + self._made.up
            + self._made.mlp
            + self._made.rows * model.width
        )
        again = self.config.train.remat == "full"
        added = (2 + len(first) - 1) * model.width  # the stream, and sums of input gradients
        block = size * ((3 + again) * ends + added)
        return model.layers * block + 3 * size * self._predicted * (model.width + self._sizes.decoder)

    @property
    def _product_bytes_of_weights(self) -> float:
        again = self.config.train.remat == "full"
        return self.parameters * ((2 + again) * self.compute_bytes + _FLOAT)

    # ---- bytes of all other kernels

    @property
    def _passes_of_token(self) -> float:
        model, size = self.config.model, self.compute_bytes
        up = self._made.up
        turned = sum(self._sizes.qkv[:2]) * bool(model.qk_norm or model.positions == "rotary")
        forward = (
            4 * model.width
            + 2 * turned
            + up
            + self._made.mlp
            + 2 * self._made.sent
            + 3 * model.embedding_skip * model.width
        )
        backward = (
            8 * model.width
            + 3 * turned
            + 2 * up
            + self._made.mlp
            + 2 * self._made.sent
            + 4 * model.embedding_skip * model.width
        )
        backward += 2 * self._inner  # the products of attention's result with its gradient
        again = forward if self.config.train.remat != "none" else 0
        block = size * (forward + self._walks * (backward + again))
        if not self.gpu.has_bfloat16:
            # XLA's own kernels read and write twice as much, and scores of all pairs, float32, in both passes.
            block = 2 * block + 6 * _FLOAT * self._sizes.heads * min(self._length, widest_window(model) or self._length)
        if not self.unrolled:  # into stacks and out of them: what is kept is read and written twice more
            block += 4 * self._step.kept_of_block(self.config.train.remat) / self._step.tokens
        embedding = (8 + 4 * size) * model.width
        head = self._predicted * size * (2 * self._sizes.decoder + 5 * model.width)
        return model.layers * block + embedding + head

    @property
    def _passes_of_weights(self) -> float:
        """Weights rounded, and gradients added up over microbatches; by a scan, cut out of stacks and put into them."""
        held = self._step.parameter_bytes
        passes = 1 + (not self.unrolled) + (self.config.train.remat == "full")
        rounded = passes * (held + self.compute_bytes)
        accumulating = self.config.batch.size != (self.config.batch.microbatch or self.config.batch.size)
        stacked = 3 * _FLOAT if not self.unrolled and not self._step.walks else 0
        return self.parameters * (rounded + stacked + 3 * _FLOAT * accumulating)

    # ---- sizes

    @cached_property
    def _step(self) -> Step:
        return Step(self.config, self.vocab_size, self.compute_dtype, self.gpu)

    @property
    def _made(self) -> FeedForward:
        return self._step.feed_forward

    @cached_property
    def _sizes(self) -> Sizes:
        return sizes_of(self.config.model, self.vocab_size, self._length)

    @property
    def _inner(self) -> int:
        return self._sizes.heads * self._sizes.head_dim

    @property
    def _length(self) -> int:
        return self.config.data.sequence_length

    @property
    def _predicted(self) -> float:
        """Tokens that the head predicts, of each."""
        return self.config.objective.predicted(self._length) / self._length
