"""Bytes of a training step, from its configuration alone: what our kernels keep for the backward pass, added up.

A step's memory is at its peak in one of three phases: at the head, whose logits exist a chunk at a time; in the backward
pass of the last block, when everything kept is still there; or in the optimizer. Each phase is a sum of buffers that
the code names: `kernels/dense` keeps the rows it multiplies, `activate` and `normalise` what they read, attention its
operands, its result and the log-sum-exp. What XLA adds (copies it could not avoid, gaps between buffers) was found in
its buffer assignment; `benchmarks/plan_accuracy.py` holds the sums against the compiler's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.kernels.cross_entropy import tail_shares
from cramjax.model import ParameterCount, count_parameters, sizes_of
from cramjax.model.stack import UNROLL_LAYERS

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""What device memory holds. Logits and workspace take turns: workspace is what other phases need beyond the logits."""

_FLOAT = 4

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
        phases = [self._at_head(), self._in_backward_pass(), self._in_optimizer()]
        shared = {"weights": self._weights, "optimizer": self._moments, "logits": self._logits}
        totals = [gradients + activations + max(self._logits, work) for gradients, activations, work in phases]
        gradients, activations, work = phases[totals.index(max(totals))]
        work = max(0, work - self._logits) + _FLOAT * self.config.batch.size * self._length
        parts = {**shared, "gradients": gradients, "activations": activations, "workspace": work}
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
        return self._all_gradients if self._microbatches > 1 else 0.0

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

    # ---- the phases: (gradients, activations, the rest)

    def _at_head(self) -> tuple[float, float, float]:
        return self._accumulated + self._head_gradient, self._kept, self._logits + self._stream

    def _in_backward_pass(self) -> tuple[float, float, float]:
        if self._unrolled:
            # A layer's gradients come as what it kept goes; at the end they are put together.
            begin = self._accumulated + self._head_gradient + self._block_gradients / self.config.model.layers
            end = self._accumulated + self._head_gradient + 2 * self._block_gradients
            work = self._block_workspace + self._stream
            if begin + self._kept >= end:
                return begin, self._kept, work
            return end, self._kept / self.config.model.layers, work
        gradients = self._accumulated + self._head_gradient + self._block_gradients
        return gradients, self._kept + self._stream, self._block_workspace

    def _in_optimizer(self) -> tuple[float, float, float]:
        work = 0.0
        if self.config.optim.name == "muon":  # the direction, before and after it is made orthogonal
            work = 2 * _FLOAT * self._parameters.blocks / self._shards(1)
        return max(self._accumulated, self._all_gradients), 0.0, work

    # ---- activations, in bytes of a microbatch

    @property
    def _kept(self) -> float:
        """What the forward pass keeps of all blocks."""
        return self.config.model.layers * self._kept_of_block(self.config.train.remat)

    def _kept_of_block(self, remat: str) -> float:
        model, sizes, size = self.config.model, self._sizes, self._compute_bytes
        qkv, up, inner = sum(sizes.qkv), sum(sizes.up), sizes.heads * sizes.head_dim
        stream = model.width
        if remat == "full":
            return self._tokens * size * stream
        norms = 4 * stream  # what each reads, and what the product after it reads
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        # The attention's result is kept twice by a scan: by itself, and as rows by the product after it.
        attention = queries_and_keys + qkv + (1 if self._unrolled else 2) * inner
        skip = model.embedding_skip * stream
        masks = 2 * stream / size if model.dropout else 0  # one byte per entry
        numbers = norms + attention + up + model.mlp + skip + masks
        return self._tokens * (size * numbers + _FLOAT * sizes.heads)

    @property
    def _block_workspace(self) -> float:
        """The most that the backward pass of one block holds at a time, beside the stream's gradient.

        Products leave float32, which is then rounded. Gradients of weights are taken last, so that the gradient of the
        first feed-forward product lasts until then, through the attention.
        """
        model, sizes, size = self.config.model, self._sizes, self._compute_bytes
        qkv, up, inner = sum(sizes.qkv), sum(sizes.up), sizes.heads * sizes.head_dim
        mlp = (_FLOAT * (1 + len(sizes.up) - 1)) * model.mlp + 2 * size * up
        normed = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        attention = size * (up + 2 * model.width + (qkv + inner) + 2 * qkv + normed) + self._score_bytes
        if self.config.train.remat == "none":
            return self._tokens * max(mlp, attention)
        again = self._kept_of_block("none") / self._tokens
        return self._tokens * (again + max(_FLOAT * model.mlp + size * up, 2 * size * qkv + self._score_bytes))

    @property
    def _score_bytes(self) -> float:
        """Scores for each token where attention is XLA's: of a block of queries against all keys, in three arrays."""
        if self.gpu is not None and self.gpu.has_bfloat16:
            return 0.0
        keys = min(self._length, self.config.model.window or self._length)
        queries = min(128, self._length) / self._length
        return self._sizes.heads * keys * queries * (2 * _FLOAT + 2 * self._compute_bytes)

    @property
    def _stream(self) -> float:
        """The residual stream, or its gradient."""
        return self._tokens * self._compute_bytes * self.config.model.width

    # ---- the head

    @property
    def _logits(self) -> float:
        """What the head's loss holds: a chunk of logits and their gradient, and the decoder in the compute precision."""
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
        if self.config.train.offload_optimizer:  # moments, and float32 weights
            host["optimizer"] = int(_FLOAT * (self._moment_arrays + self._parameters.total))
        if self.config.train.remat == "offload":
            host["activations"] = int(self.config.model.layers * self._kept_of_block("selective"))
        return host

    # ---- sizes

    @cached_property
    def _parameters(self) -> ParameterCount:
        return count_parameters(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @cached_property
    def _sizes(self):
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
        return loop == "unroll" or (loop == "auto" and layers <= UNROLL_LAYERS)

    def _shards(self, stage: int) -> int:
        """Parts that a state is cut into: ZeRO's stages shard optimizer (1), gradients (2) and weights (3)."""
        return self.config.train.fsdp if self.config.train.zero >= stage else 1
