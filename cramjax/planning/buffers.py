"""The buffers of a training step on a GPU: what our kernels keep for the backward pass, and what XLA adds to it.

A step's memory is at its peak in one of three phases: at the head, whose logits exist a chunk at a time; in the
backward pass of the last block, when everything kept is still there; or in the optimizer. Each phase is a sum of
buffers that the code names: `kernels/dense` keeps the rows it multiplies, `activate` and `normalise` what they read
(and `normalise` two numbers a row, which are not counted), attention its operands, its result and the log-sum-exp. What
XLA adds (copies it could not avoid, gaps between buffers) was found in its buffer assignment;
`benchmarks/plan_accuracy.py` holds the sums against the compiler's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.xla import MOST_QUERIES, chunk_size
from cramjax.kernels.cross_entropy.fused import tile_count
from cramjax.model import ParameterCount, count_parameters
from cramjax.model.sizes import Sizes, sizes_of
from cramjax.model.stack import unrolls
from cramjax.train.offload_state import host_bytes

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
"""What device memory holds. Logits and workspace take turns: workspace is what the backward pass of a block needs
beyond what the logits took before it."""

FLOAT = 4
TOKEN = 4

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
    """Host bytes that the step itself needs for all devices: of offloaded optimizer state, weights and activations."""

    @property
    def device_bytes(self) -> int:
        """All bytes of a device."""
        return sum(self.by_kind.values())

    @property
    def host_bytes(self) -> int:
        """All bytes of the host."""
        return sum(self.host_by_kind.values())


@dataclass(frozen=True)
class Step:
    """One training step, and the buffers of each of its phases in bytes of one device."""

    config: RunConfig
    vocab_size: int
    compute_dtype: str
    gpu: Gpu | None

    def memory(self) -> Memory:
        """The phase with most bytes, by kind."""
        phases = (self.at_head(), self.in_backward_pass(), self.in_optimizer())
        gradients, activations, work = max(phases, key=sum)
        work += TOKEN * self.config.batch.size * self.length + self.holes
        parts = {
            "weights": self.weights,
            "optimizer": self.moments,
            "gradients": gradients,
            "activations": activations,
            "logits": min(work, self.logits),
            "workspace": max(0.0, work - self.logits),
        }
        return Memory({kind: int(parts[kind]) for kind in KINDS}, self.host())

    # ---- what is there throughout

    @property
    def weights(self) -> float:
        """Parameters, as the device holds them."""
        return self.parameter_bytes * self.parameters.total / self.shards(3)

    @property
    def moments(self) -> float:
        """The optimizer's state, as the device holds it."""
        if self.config.train.offload_optimizer:
            return 0.0
        return self.moment_arrays * FLOAT / self.shards(1)

    @cached_property
    def moment_arrays(self) -> float:
        """float32 numbers of the optimizer's state."""
        optim, parameters = self.config.optim, self.parameters
        of_matrices, of_rest = _MOMENTS[optim.name]
        rest = parameters.total - parameters.blocks
        numbers = of_matrices * parameters.blocks + of_rest * rest
        if optim.name in ("adafactor", "adalomo"):
            numbers += self.factored_moments
        return numbers + bool(optim.ema) * parameters.total

    @cached_property
    def factored_moments(self) -> int:
        """One number for each row and each column of every matrix."""
        model, sizes = self.config.model, self.sizes
        inner = sizes.heads * sizes.head_dim
        shapes = ((model.width, sum(sizes.qkv)), (inner, model.width), (model.width, sum(sizes.up)))
        block = sum(rows + columns for rows, columns in (*shapes, (model.mlp, model.width)))
        return model.layers * block + (1 + (not model.tied)) * (sizes.vocab + model.width)

    @property
    def accumulated(self) -> float:
        """Gradients summed over microbatches, beside those of the microbatch at hand."""
        return self.all_gradients if self.microbatches > 1 and not self.walks else 0.0

    @property
    def all_gradients(self) -> float:
        """One gradient of every parameter."""
        return self.parameter_bytes * self.parameters.total / self.shards(2)

    @property
    def block_gradients(self) -> float:
        """Of a microbatch: the compiler shares them out as the optimizer's state is, whatever becomes of their sum."""
        return self.parameter_bytes * self.parameters.blocks / self.shards(1)

    @property
    def head_gradient(self) -> float:
        """Of the decoder, which is float32 and there before the blocks' are."""
        return FLOAT * self.decoder_numbers

    @property
    def holes(self) -> float:
        """Gaps between buffers: XLA lays Muon's temporaries between the gradients that are added up, and they stay."""
        return 0.75 * FLOAT * self.parameters.blocks * (self.config.optim.name == "muon" and self.microbatches > 1)

    # ---- the phases: (gradients, activations, the rest)

    @property
    def walked_gradients(self) -> float:
        """What a backward walk holds of gradients: one matrix's, and a tied head's until the embedding's is there."""
        model, sizes = self.config.model, self.sizes
        largest = model.width * max(sum(sizes.qkv), sum(sizes.up), model.mlp)
        if self.config.train.offload_optimizer:  # a whole block's, in float32 and rounded
            largest = (1 + self.parameter_bytes / FLOAT) * self.parameters.blocks / model.layers
        return model.tied * self.parameter_bytes * self.decoder_numbers + FLOAT * largest

    def at_head(self) -> tuple[float, float, float]:
        """When the loss is taken."""
        return self.accumulated + self.head_gradient, self.kept, self.logits + self.stream

    def in_backward_pass(self) -> tuple[float, float, float]:
        """When the backward pass of the last block is at its largest."""
        if self.unrolled and not self.walks:
            # A layer's gradients come as what it kept goes; at the end they are put together.
            begin = self.accumulated + self.head_gradient + self.block_gradients / self.config.model.layers
            end = self.accumulated + self.head_gradient + 2 * self.block_gradients
            work = self.block_workspace + self.stream
            if begin + self.kept >= end:
                return begin, self.kept, work
            return end, self.kept / self.config.model.layers, work
        if self.walks:
            return self.walked_gradients, self.kept + self.stream, self.block_workspace
        gradients = self.accumulated + self.head_gradient + self.block_gradients
        return gradients, self.kept + self.stream, self.block_workspace

    def in_optimizer(self) -> tuple[float, float, float]:
        """When parameters are updated."""
        work = 0.0
        if self.walks:  # the embedding's update: its gradient, what it becomes, and random bits
            return FLOAT * self.decoder_numbers, 0.0, 2 * FLOAT * self.decoder_numbers
        if self.config.optim.name == "muon":  # the direction, before and after it is made orthogonal
            work = 2 * FLOAT * self.parameters.blocks / self.shards(1)
        return max(self.accumulated, self.all_gradients), 0.0, work

    # ---- activations, in bytes of a microbatch

    @property
    def kept(self) -> float:
        """What the forward pass keeps of all blocks, on the device."""
        remat = self.config.train.remat
        return 0.0 if remat == "offload" else self.config.model.layers * self.kept_of_block(remat)

    def kept_of_block(self, remat: str) -> float:
        """What the forward pass keeps of one block under a policy."""
        model, sizes, size = self.config.model, self.sizes, self.compute_bytes
        up, inner = sum(sizes.up), sizes.heads * sizes.head_dim
        stream = model.width
        if remat == "full":
            return self.tokens * size * stream
        if remat in ("selective", "offload"):  # the stream, and the products that are read again: see `model/remat.py`
            return self.tokens * size * (2 * stream + sum(sizes.qkv) + up)
        norms = 4 * stream  # what each reads, and what the product after it reads
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        # The attention's result is kept twice by a scan: by itself, and as rows by the product after it.
        attention = queries_and_keys + self.operands + (1 if self.unrolled else 2) * inner
        skip = model.embedding_skip * stream
        masks = 2 * stream / size if model.dropout else 0  # one byte per entry
        numbers = norms + attention + up + model.mlp + skip + masks
        return self.tokens * (size * numbers + FLOAT * sizes.heads)

    @property
    def operands(self) -> float:
        """Queries, keys and values that attention keeps of a token, in numbers."""
        queries, keys, values = self.sizes.qkv
        return queries + self.repeated_keys * (keys + values)

    @property
    def block_workspace(self) -> float:
        """The most that the backward pass of one block holds at a time, beside the stream's gradient.

        Products leave float32, which is then rounded. Gradients of weights are taken last, so that the gradient of the
        first feed-forward product lasts until then, through the attention. A scan copies out of its stacks what a
        block has kept, when it comes to it.
        """
        model, sizes, size = self.config.model, self.sizes, self.compute_bytes
        qkv, up, inner = sum(sizes.qkv), sum(sizes.up), sizes.heads * sizes.head_dim
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        mlp = FLOAT * len(sizes.up) * model.mlp + 2 * size * up
        by_operands = self.operands + qkv  # each chunk's, then put together
        attention = size * (2 * model.width + inner + by_operands + queries_and_keys) + self.score_bytes
        if self.config.train.remat == "none":
            return self.masks + self.tokens * max(mlp, attention + size * (up + self.operands))
        again = self.kept_of_block("none") / self.tokens - size * inner * (not self.unrolled)
        if self.config.train.remat == "full":
            mlp += again - size * up  # which is among what is computed again
        else:  # the attention's result is there: its operands are computed again after the feed-forward layer
            mlp += size * (3 * model.width + model.mlp)
        attention += again
        if self.walks:
            # Each matrix's gradient is taken, and visited, before the backward pass goes on: what it read is let go.
            # Where a whole block's are handed out together, XLA keeps to that order or not, by the memory there is.
            together = 0.5 if self.config.train.offload_optimizer and self.fused else 1.0
            mlp -= together * size * model.mlp
            attention -= size * (up + together * model.mlp + model.width)
        elif self.config.train.remat == "offload":  # copies from the host come late, and so does what is made of them
            attention -= size * model.mlp
        return self.masks + self.tokens * max(mlp, attention)

    @property
    def walks(self) -> bool:
        """Whether the backward pass is `train/walk.py`'s, which keeps no gradients."""
        return self.config.optim.name in ("lomo", "adalomo") or self.config.train.offload_optimizer

    @property
    def fused(self) -> bool:
        """Whether attention is a fused kernel, or XLA's in chunks of queries."""
        return self.gpu is not None and self.gpu.has_bfloat16

    @cached_property
    def visible_keys(self) -> list[int]:
        """Keys that each chunk of queries reads, where attention is XLA's."""
        causal, window = self.config.objective.kind == "causal", self.config.model.window
        mask = Mask(causal, window)
        size = chunk_size(self.length, mask.skips)
        starts = range(0, self.length, size)
        seen = (mask.visible_keys((start, min(start + size, self.length)), self.length) for start in starts)
        return [stop - start for start, stop in seen]

    @property
    def repeated_keys(self) -> float:
        """Times that keys and values are held: every chunk keeps those it reads."""
        return 1.0 if self.fused else max(1.0, sum(self.visible_keys) / self.length)

    @property
    def score_bytes(self) -> float:
        """Scores of one chunk of XLA's attention, per token.

        Four arrays in float32 and two in the compute precision; of the float32 ones two where the block is computed
        again, since then nothing of it waits in stacks to be copied out between them.
        """
        if self.fused:
            return 0.0
        size = min(self.length / len(self.visible_keys), MOST_QUERIES)
        pairs = size * max(self.visible_keys) / self.length
        again = self.config.train.remat in ("full", "offload") and not self.config.train.offload_optimizer
        return self.sizes.heads * pairs * ((2 if again else 4) * FLOAT + 2 * self.compute_bytes)

    @property
    def pairs(self) -> float:
        """Scores of a head for each token, in XLA's attention: all chunks together."""
        return self.repeated_keys * self.length / len(self.visible_keys)

    @property
    def masks(self) -> float:
        """What hides pairs in XLA's attention, in the shape of the scores: the compiler takes it out of a scan.

        Not so where LOMO's walk stops at each gradient.
        """
        skips = Mask(self.config.objective.kind == "causal", self.config.model.window).skips
        if self.fused or self.unrolled or not skips or self.config.optim.name in ("lomo", "adalomo"):
            return 0.0
        return self.tokens * self.sizes.heads * self.pairs * (FLOAT + 1)

    @property
    def stream(self) -> float:
        """The residual stream, or its gradient."""
        return self.tokens * self.compute_bytes * self.config.model.width

    # ---- the head

    @property
    def logits(self) -> float:
        """What the head's loss holds: a chunk of logits, their gradient, and the decoder in the compute precision."""
        # The head, and each tail of an adaptive softmax, which takes all tokens where it has not room for its own.
        heads = [(self.config.model.width, self.sizes.decoder), *self.sizes.tails]
        return max(self.logits_of(width, columns) for width, columns in heads)

    def logits_of(self, width: int, columns: int) -> float:
        """What the loss of one head holds."""
        size, tokens, decoder = self.compute_bytes, self.predicted, width * columns
        chunks = self.chunks(tokens, columns)
        logits = (FLOAT + size) * tokens / chunks * columns
        return logits + 2 * size * decoder + (FLOAT * decoder if chunks > 1 else 0)

    def chunks(self, tokens: int, columns: int) -> int:
        """Chunks of the loss, as `kernels/cross_entropy/fused.py` cuts them."""
        if self.gpu is None:
            return tile_count(tokens, columns, FLOAT, None)
        return tile_count(tokens, columns, self.compute_bytes, self.gpu.memory)

    @property
    def decoder_numbers(self) -> int:
        """Entries of the decoder: the embedding if they are tied, and the tails of an adaptive softmax."""
        tails = sum(narrow * (self.config.model.width + tokens) for narrow, tokens in self.sizes.tails)
        return self.config.model.width * self.sizes.decoder + tails

    # ---- the host

    def host(self) -> dict[str, int]:
        """Host bytes by kind, of all devices: as `train/offload.py` and `model/remat.py` send them there."""
        host, train = {}, self.config.train
        data = train.data_parallel or 1
        if train.offload_optimizer:
            host |= host_bytes(self.config, self.parameters.total, copies=data)
        if train.remat == "offload":
            of_each = int(self.config.model.layers * self.kept_of_block("selective"))
            host["activations"] = data * train.fsdp * of_each
        return host

    # ---- sizes

    @cached_property
    def parameters(self) -> ParameterCount:
        """Numbers, by part of the model."""
        return count_parameters(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @cached_property
    def sizes(self) -> Sizes:
        """Shapes of the parameters."""
        return sizes_of(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config.data.sequence_length

    @property
    def microbatch(self) -> int:
        """Sequences of a microbatch, over all devices."""
        return self.config.batch.microbatch or self.config.batch.size

    @property
    def microbatches(self) -> int:
        """Microbatches of a step."""
        return self.config.batch.size // self.microbatch

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one device."""
        devices = (self.config.train.data_parallel or 1) * self.config.train.fsdp
        return max(1, self.microbatch // devices) * self.length

    @property
    def predicted(self) -> int:
        """Tokens of a microbatch that the head predicts."""
        objective = self.config.objective
        if objective.kind == "causal":
            return self.tokens
        rate = max(objective.mask_rate, objective.mask_rate_end or 0.0)
        return self.tokens // self.length * round(rate * self.length)

    @property
    def compute_bytes(self) -> int:
        """Of a number among the activations."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def parameter_bytes(self) -> int:
        """Of a parameter on the device, and of its gradient."""
        return 2 if self.config.train.param_dtype == "bfloat16" else 4

    @property
    def unrolled(self) -> bool:
        """Whether the stack is walked without a loop, as `model/stack.py` decides."""
        train, platform = self.config.train, "cpu" if self.gpu is None else "gpu"
        return not self.walks and unrolls(train.layer_loop, self.config.model.layers, train.remat, platform)

    def shards(self, stage: int) -> int:
        """Parts that a state is cut into: ZeRO's stages shard optimizer (1), gradients (2) and weights (3)."""
        return self.config.train.fsdp if self.config.train.zero >= stage else 1
