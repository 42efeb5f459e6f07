"""Bytes of a training step, from its configuration alone: what our kernels keep for the backward pass, added up.

A step's memory is at its peak in one of three phases: at the head, whose logits exist a chunk at a time; in the
backward pass of the last block, when everything kept is still there; or in the optimizer. Each phase is a sum of
buffers that the code names: `kernels/dense` keeps the rows it multiplies, `activate` and `normalise` what they read,
attention its operands, its result and the log-sum-exp. What XLA adds (copies it could not avoid, gaps between buffers)
was found in its buffer assignment; `benchmarks/plan_accuracy.py` holds the sums against the compiler's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.xla import MOST_QUERIES, chunk_size
from cramjax.model import ParameterCount, count_parameters
from cramjax.model.sizes import Sizes, sizes_of
from cramjax.model.stack import UNROLL_LAYERS

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""What device memory holds. Logits and workspace take turns: workspace is what the backward pass of a block needs
beyond what the logits took before it."""

_FLOAT = 4
_TOKEN = 4

# float32 arrays per parameter that an optimizer keeps, of matrices in blocks and of the rest (as optax has them).
_MOMENTS = {
    "adamw": (2, 2),
    "muon": (1, 2),
    "lion": (1, 1),
    "adan": (4, 4),
    "sophia": (2, 2),
    "adafactor": (0, 0),
    "schedule_free_adamw": (2, 2),
    "lomo": (0, 0),
    "adalomo": (0, 0),
}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, on each device and on the host."""

    by_kind: Mapping[str, int]
    """Device bytes of each of `KINDS`."""
    host_by_kind: Mapping[str, int] = field(default_factory=dict)
    """Host bytes that the step itself needs: of offloaded optimizer state, weights and activations."""

    @property
    def device_bytes(self) -> int:
        """All bytes of a device."""
        return sum(self.by_kind.values())

    @property
    def host_bytes(self) -> int:
        """All bytes of the host."""
        return sum(self.host_by_kind.values())


def estimate_memory(config: RunConfig, *, vocab_size: int, compute_dtype: str, gpu: Gpu | None) -> Memory:
    """Memory of a configuration's training step.

    Args:
        config: the run; `batch.microbatch`, `train` and `optim` say what is to fit.
        vocab_size: tokens of its vocabulary, without padding.
        compute_dtype: precision of activations, `float32` or `bfloat16`.
        gpu: the card; None: a CPU.
    """
    return _Step(config, vocab_size, compute_dtype, gpu).memory()


@dataclass(frozen=True)
class _Step:
    """One training step, and the buffers of each of its phases in bytes of one device."""

    config: RunConfig
    vocab_size: int
    compute_dtype: str
    gpu: Gpu | None

    def memory(self) -> Memory:
        """The phase with most bytes, by kind."""
        phases = (self._at_head(), self._in_backward_pass(), self._in_optimizer())
        gradients, activations, work = max(phases, key=sum)
        work += _TOKEN * self.config.batch.size * self._length + self._holes
        parts = {
            "weights": self._weights,
            "optimizer": self._moments,
            "gradients": gradients,
            "activations": activations,
            "logits": min(work, self._logits),
            "workspace": max(0.0, work - self._logits),
        }
        return Memory({kind: int(parts[kind]) for kind in KINDS}, self._host())

    # ---- what is there throughout

    @property
    def _weights(self) -> float:
        return self._parameter_bytes * self._parameters.total / self._shards(3)

    @property
    def _moments(self) -> float:
        if self.config.train.offload_optimizer:
            return 0.0
        return self._moment_arrays * _FLOAT / self._shards(1)

    @cached_property
    def _moment_arrays(self) -> float:
        """float32 numbers of the optimizer's state."""
        optim, parameters = self.config.optim, self._parameters
        of_matrices, of_rest = _MOMENTS[optim.name]
        rest = parameters.total - parameters.blocks
        numbers = of_matrices * parameters.blocks + of_rest * rest
        if optim.name in ("adafactor", "adalomo"):
            numbers += self._factored_moments
        return numbers + bool(optim.ema) * parameters.total

    @cached_property
    def _factored_moments(self) -> int:
        """One number for each row and each column of every matrix."""
        model, sizes = self.config.model, self._sizes
        inner = sizes.heads * sizes.head_dim
        shapes = ((model.width, sum(sizes.qkv)), (inner, model.width), (model.width, sum(sizes.up)))
        block = sum(rows + columns for rows, columns in (*shapes, (model.mlp, model.width)))
        return model.layers * block + (1 + (not model.tied)) * (sizes.vocab + model.width)

    @property
    def _accumulated(self) -> float:
        """Gradients summed over microbatches, beside those of the microbatch at hand."""
        return self._all_gradients if self._microbatches > 1 and not self._walks else 0.0

    @property
    def _all_gradients(self) -> float:
        return self._parameter_bytes * self._parameters.total / self._shards(2)

    @property
    def _block_gradients(self) -> float:
        return self._parameter_bytes * self._parameters.blocks / self._shards(2)

    @property
    def _head_gradient(self) -> float:
        """Of the decoder, which is float32 and there before the blocks' are."""
        return _FLOAT * self._decoder_numbers

    @property
    def _holes(self) -> float:
        """Gaps between buffers: XLA lays Muon's temporaries between the gradients that are added up, and they stay."""
        return 0.75 * _FLOAT * self._parameters.blocks * (self.config.optim.name == "muon" and self._microbatches > 1)

    # ---- the phases: (gradients, activations, the rest)

    @property
    def _walked_gradients(self) -> float:
        """What a backward walk holds of gradients: one matrix's, and a tied head's until the embedding's is there."""
        model, sizes = self.config.model, self._sizes
        largest = model.width * max(sum(sizes.qkv), sum(sizes.up), model.mlp)
        if self.config.train.offload_optimizer:  # a whole block's, in float32 and rounded
            largest = (1 + self._parameter_bytes / _FLOAT) * self._parameters.blocks / model.layers
        return model.tied * self._parameter_bytes * self._decoder_numbers + _FLOAT * largest

    def _at_head(self) -> tuple[float, float, float]:
        return self._accumulated + self._head_gradient, self._kept, self._logits + self._stream

    def _in_backward_pass(self) -> tuple[float, float, float]:
        if self._unrolled and not self._walks:
            # A layer's gradients come as what it kept goes; at the end they are put together.
            begin = self._accumulated + self._head_gradient + self._block_gradients / self.config.model.layers
            end = self._accumulated + self._head_gradient + 2 * self._block_gradients
            work = self._block_workspace + self._stream
            if begin + self._kept >= end:
                return begin, self._kept, work
            return end, self._kept / self.config.model.layers, work
        if self._walks:
            return self._walked_gradients, self._kept + self._stream, self._block_workspace
        gradients = self._accumulated + self._head_gradient + self._block_gradients
        return gradients, self._kept + self._stream, self._block_workspace

    def _in_optimizer(self) -> tuple[float, float, float]:
        work = 0.0
        if self._walks:  # the embedding's update: its gradient, what it becomes, and random bits
            return _FLOAT * self._decoder_numbers, 0.0, 2 * _FLOAT * self._decoder_numbers
        if self.config.optim.name == "muon":  # the direction, before and after it is made orthogonal
            work = 2 * _FLOAT * self._parameters.blocks / self._shards(1)
        return max(self._accumulated, self._all_gradients), 0.0, work

    # ---- activations, in bytes of a microbatch

    @property
    def _kept(self) -> float:
        """What the forward pass keeps of all blocks, on the device."""
        remat = self.config.train.remat
        return 0.0 if remat == "offload" else self.config.model.layers * self._kept_of_block(remat)

    def _kept_of_block(self, remat: str) -> float:
        model, sizes, size = self.config.model, self._sizes, self._compute_bytes
        up, inner = sum(sizes.up), sizes.heads * sizes.head_dim
        stream = model.width
        if remat == "full":
            return self._tokens * size * stream
        if remat in ("selective", "offload"):  # the stream, and the products that are read again: see `model/remat.py`
            return self._tokens * size * (2 * stream + sum(sizes.qkv) + up)
        norms = 4 * stream  # what each reads, and what the product after it reads
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        # The attention's result is kept twice by a scan: by itself, and as rows by the product after it.
        attention = queries_and_keys + self._operands + (1 if self._unrolled else 2) * inner
        skip = model.embedding_skip * stream
        masks = 2 * stream / size if model.dropout else 0  # one byte per entry
        numbers = norms + attention + up + model.mlp + skip + masks
        return self._tokens * (size * numbers + _FLOAT * sizes.heads)

    @property
    def _operands(self) -> float:
        """Queries, keys and values that attention keeps of a token, in numbers."""
        queries, keys, values = self._sizes.qkv
        return queries + self._repeated_keys * (keys + values)

    @property
    def _block_workspace(self) -> float:
        """The most that the backward pass of one block holds at a time, beside the stream's gradient.

        Products leave float32, which is then rounded. Gradients of weights are taken last, so that the gradient of the
        first feed-forward product lasts until then, through the attention. A scan copies out of its stacks what a
        block has kept, when it comes to it.
        """
        model, sizes, size = self.config.model, self._sizes, self._compute_bytes
        qkv, up, inner = sum(sizes.qkv), sum(sizes.up), sizes.heads * sizes.head_dim
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        mlp = _FLOAT * len(sizes.up) * model.mlp + 2 * size * up
        by_operands = self._operands + qkv  # each chunk's, then put together
        attention = size * (2 * model.width + inner + by_operands + queries_and_keys) + self._score_bytes
        if self.config.train.remat == "none":
            return self._masks + self._tokens * max(mlp, attention + size * (up + self._operands))
        again = self._kept_of_block("none") / self._tokens - size * inner * (not self._unrolled)
        if self.config.train.remat == "full":
            mlp += again - size * up  # which is among what is computed again
        else:  # the attention's result is there: its operands are computed again after the feed-forward layer
            mlp += size * (3 * model.width + model.mlp)
        attention += again
        if self._walks:
            # Each matrix's gradient is taken, and visited, before the backward pass goes on: what it read is let go.
            mlp -= size * model.mlp
            attention -= size * (up + model.mlp + model.width)
        elif self.config.train.remat == "offload":  # copies from the host come late, and so does what is made of them
            attention -= size * model.mlp
        return self._masks + self._tokens * max(mlp, attention)

    @property
    def _walks(self) -> bool:
        """Whether the backward pass is `train/walk.py`'s, which keeps no gradients."""
        return self.config.optim.name in ("lomo", "adalomo") or self.config.train.offload_optimizer

    @property
    def _fused(self) -> bool:
        """Whether attention is a fused kernel, or XLA's in chunks of queries."""
        return self.gpu is not None and self.gpu.has_bfloat16

    @cached_property
    def _visible_keys(self) -> list[int]:
        """Keys that each chunk of queries reads, where attention is XLA's."""
        causal, window = self.config.objective.kind == "causal", self.config.model.window
        mask = Mask(causal, window)
        size = chunk_size(self._length, mask.skips)
        starts = range(0, self._length, size)
        seen = (mask.visible_keys((start, min(start + size, self._length)), self._length) for start in starts)
        return [stop - start for start, stop in seen]

    @property
    def _repeated_keys(self) -> float:
        """Times that keys and values are held: every chunk keeps those it reads."""
        return 1.0 if self._fused else max(1.0, sum(self._visible_keys) / self._length)

    @property
    def _score_bytes(self) -> float:
        """Scores of one chunk of XLA's attention, per token: four arrays in float32, two in the compute precision."""
        if self._fused:
            return 0.0
        size = min(self._length / len(self._visible_keys), MOST_QUERIES)
        pairs = size * max(self._visible_keys) / self._length
        return self._sizes.heads * pairs * (4 * _FLOAT + 2 * self._compute_bytes)

    @property
    def _masks(self) -> float:
        """What hides pairs in XLA's attention, in the shape of the scores: the compiler takes it out of a scan."""
        skips = Mask(self.config.objective.kind == "causal", self.config.model.window).skips
        if self._fused or self._unrolled or not skips:
            return 0.0
        pairs = self._repeated_keys * self._length / len(self._visible_keys)
        return self._tokens * self._sizes.heads * pairs * (_FLOAT + 1)

    @property
    def _stream(self) -> float:
        """The residual stream, or its gradient."""
        return self._tokens * self._compute_bytes * self.config.model.width

    # ---- the head

    @property
    def _logits(self) -> float:
        """What the head's loss holds: a chunk of logits, their gradient, and the decoder in the compute precision."""
        model, size = self.config.model, self._compute_bytes
        columns, tokens = self._sizes.decoder, self._predicted
        chunks = self._chunks(tokens, columns)
        decoder = model.width * columns
        logits = (_FLOAT + size) * tokens / chunks * columns
        return logits + 2 * size * decoder + (_FLOAT * decoder if chunks > 1 else 0)

    def _chunks(self, tokens: int, columns: int) -> int:
        limit = (32 if self.gpu is None else 256) << 20
        least = -(-4 * tokens * columns // limit)
        return next((count for count in range(least, min(4 * least, tokens) + 1) if tokens % count == 0), 1)

    @property
    def _decoder_numbers(self) -> int:
        tails = sum(narrow * (self.config.model.width + tokens) for narrow, tokens in self._sizes.tails)
        return self.config.model.width * self._sizes.decoder + tails

    # ---- the host

    def _host(self) -> dict[str, int]:
        host = {}
        if self.config.train.offload_optimizer:
            total, crossing = self._parameters.total / self._shards(1), self._parameter_bytes
            host["optimizer"] = int(_FLOAT * self._moment_arrays / self._shards(1))
            host["weights"] = int((_FLOAT + crossing) * total)  # and as they go down
            # As they come up; and summed, or the last ones.
            host["gradients"] = int((crossing + max(crossing, _FLOAT * (self._microbatches > 1))) * total)
        if self.config.train.remat == "offload":
            host["activations"] = int(self.config.model.layers * self._kept_of_block("selective"))
        return host

    # ---- sizes

    @cached_property
    def _parameters(self) -> ParameterCount:
        return count_parameters(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @cached_property
    def _sizes(self) -> Sizes:
        return sizes_of(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @property
    def _length(self) -> int:
        return self.config.data.sequence_length

    @property
    def _microbatch(self) -> int:
        return self.config.batch.microbatch or self.config.batch.size

    @property
    def _microbatches(self) -> int:
        return self.config.batch.size // self._microbatch

    @property
    def _tokens(self) -> int:
        """Tokens of a microbatch on one device."""
        devices = (self.config.train.data_parallel or 1) * self.config.train.fsdp
        return max(1, self._microbatch // devices) * self._length

    @property
    def _predicted(self) -> int:
        """Tokens of a microbatch that the head predicts."""
        objective = self.config.objective
        if objective.kind == "causal":
            return self._tokens
        rate = max(objective.mask_rate, objective.mask_rate_end or 0.0)
        return self._tokens // self._length * round(rate * self._length)

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def _parameter_bytes(self) -> int:
        return 2 if self.config.train.param_dtype == "bfloat16" else 4

    @property
    def _unrolled(self) -> bool:
        loop, layers = self.config.train.layer_loop, self.config.model.layers
        if self._walks:
            return False
        return loop == "unroll" or (loop == "auto" and layers <= UNROLL_LAYERS)

    def _shards(self, stage: int) -> int:
        """Parts that a state is cut into: ZeRO's stages shard optimizer (1), gradients (2) and weights (3)."""
        return self.config.train.fsdp if self.config.train.zero >= stage else 1
