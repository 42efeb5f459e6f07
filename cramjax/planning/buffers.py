"""The buffers of a training step on a GPU: what our kernels keep for the backward pass, and what XLA adds to it.

A step's memory is at its peak in one of three phases: at the head, whose logits exist a tile at a time; in the
backward pass of the last block, when everything kept is still there; or in the optimizer. Each phase is a sum of
buffers that the code names: `kernels/dense` keeps the rows it multiplies, `activate`, `normalise` and
`normalise_and_rotate` what they read, attention its operands, its result and the log-sum-exp. What XLA adds (copies it
could not avoid, what waits for its turn) was found in its buffer assignment; `benchmarks/plan_accuracy.py` holds the
sums against the compiler's.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import jax

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.xla import MOST_QUERIES, chunk_size
from cramjax.kernels.cross_entropy.fused import tile_count
from cramjax.model import Model, ParameterCount, count_parameters
from cramjax.model.pattern import repeats_of, widest_window
from cramjax.model.sizes import Sizes, sizes_of
from cramjax.model.stack import unrolls, weights_of
from cramjax.planning.feed_forward import FeedForward, feed_forward
from cramjax.planning.kinds import KINDS, Memory
from cramjax.training.frozen import split, untrained
from cramjax.training.methods import method_of
from cramjax.training.parts import Vocabulary, build_model
from cramjax.training.program import Method

FLOAT = 4
TOKEN = 4

OLDER_XLA = jax.__version_info__ < (0, 12)
"""Whether the compiler is that of jax 0.10.2, which keeps more than that of 0.12."""


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
        work += TOKEN * self.config.batch.size * self.length + self.zeros
        parts = {
            "weights": self.weights,
            "optimizer": self.moments,
            "gradients": gradients,
            "activations": activations,
            "logits": min(work, self.logits),
            "workspace": max(0.0, work - self.logits),
        }
        return Memory({kind: int(parts[kind]) for kind in KINDS}, self.host())

    @cached_property
    def method(self) -> Method:
        """How it is trained."""
        return method_of(self.config)

    # ---- what is there throughout

    @property
    def weights(self) -> float:
        """Parameters, as the device holds them."""
        if self.config.adapter is not None:
            leaves = jax.tree.leaves(self.model.abstract_params())
            return sum(x.size * x.dtype.itemsize for x in leaves) / self.shards(3)
        return self.parameter_bytes * self.parameters.total / self.shards(3)

    @property
    def moments(self) -> float:
        """The optimizer's state, as the device holds it."""
        if self.method.on_host:
            return 0.0
        return self.moment_arrays * FLOAT / self.shards(1)

    @cached_property
    def moment_arrays(self) -> float:
        """float32 numbers of the optimizer's state."""
        optim, parameters = self.config.optim, self.trained
        traits, rest = optim.traits, parameters.total - parameters.blocks
        numbers = traits.moments * parameters.blocks + traits.moments_of_rest * rest
        return numbers + traits.factored * self.factored_moments + bool(optim.ema) * parameters.total

    @cached_property
    def factored_moments(self) -> int:
        """One number for each row and each column of every matrix."""
        model, sizes = self.config.model, self.sizes
        weights = jax.tree.leaves(weights_of(model, self.vocab_size, self.config.data.sequence_length)["blocks"])
        shapes = [weight.stacked_shape for weight in weights if weight.role == "matrix"]
        blocks = sum(math.prod(lead) * (rows + columns) for *lead, rows, columns in shapes)
        return blocks + (1 + (not model.tied)) * (sizes.vocab + model.width)

    @property
    def accumulated(self) -> float:
        """Gradients summed over microbatches, beside those of the microbatch at hand."""
        return self.all_gradients if self.microbatches > 1 and not self.walks else 0.0

    @property
    def all_gradients(self) -> float:
        """One gradient of every parameter that is trained."""
        return self.parameter_bytes * self.trained.total / self.shards(2)

    @property
    def block_gradients(self) -> float:
        """Of a microbatch: the compiler shares them out as the optimizer's state is, whatever becomes of their sum."""
        return self.parameter_bytes * self.trained.blocks / self.shards(1)

    @property
    def head_gradient(self) -> float:
        """Of the decoder, which is float32 and there before the blocks' are; one product adds it where it is summed."""
        added = self.accumulated > 0 and self.tiles == 1
        return 0.0 if added else FLOAT * self.decoder_numbers

    @property
    def rounded(self) -> float:
        """The blocks' weights in the compute precision: XLA rounds those of an unrolled stack together, and first."""
        return self.compute_bytes * self.parameters.blocks * (self.unrolled and self.compute_bytes < FLOAT)

    @property
    def zeros(self) -> float:
        """What cautious decay compares with: older XLA takes it from where sums of gradients begin, and keeps it.

        Sums are those over microbatches, and a scan's of its layers' gradients.
        """
        optim = self.config.optim
        compared = OLDER_XLA and optim.cautious_decay and optim.weight_decay > 0 and not self.walks
        begun = self.microbatches > 1 or not self.unrolled
        return FLOAT * self.parameters.blocks / self.shards(1) * (compared and begun)

    # ---- the phases: (gradients, activations, the rest)

    @property
    def walked_gradients(self) -> float:
        """What a backward walk holds of gradients: one matrix's, and a tied head's until the embedding's is there."""
        model, sizes = self.config.model, self.sizes
        largest = max(model.width * sum(sizes.qkv), self.feed_forward.largest)
        if self.method.on_host:  # a whole block's, in float32 and rounded
            largest = (1 + self.parameter_bytes / FLOAT) * self.parameters.blocks / self.repeats
        head = FLOAT if self.tiles > 1 else self.parameter_bytes  # summed over tiles, it is rounded when it is used
        return model.tied * head * self.decoder_numbers + FLOAT * largest

    def at_head(self) -> tuple[float, float, float]:
        """When the loss is taken."""
        gradients = self.accumulated + self.head_gradient
        if OLDER_XLA and not self.unrolled and not self.walks and not (self.zeros and self.microbatches > 1):
            gradients += self.block_gradients  # zeros, to which a scan adds: where there are others, these come later
        return gradients, self.kept + self.ends, self.logits + self.rounded

    def in_backward_pass(self) -> tuple[float, float, float]:
        """When the backward pass of the last block is at its largest."""
        if self.unrolled and not self.walks:
            # A layer's gradients come as what it kept goes, and wait for the optimizer; or each matrix's are added up.
            begin = self.accumulated + self.head_gradient + self.block_gradients / self.config.model.layers
            end = max(self.accumulated, self.block_gradients) + self.head_gradient
            work = self.block_workspace + self.stream + self.rounded
            if self.tiles == 1:  # operands of weights' gradients wait, the logits' gradient among them
                work += self.logits
            if begin + self.kept >= end:
                return begin, self.kept + self.ends, work
            return end, self.kept / self.config.model.layers + self.ends, work
        work = self.block_workspace + self.stream * self.config.model.embedding_norm
        if self.walks:
            return self.walked_gradients, self.kept + self.stream, work
        gradients = self.accumulated + self.head_gradient + self.block_gradients
        return gradients, self.kept + self.stream, work

    def in_optimizer(self) -> tuple[float, float, float]:
        """When parameters are updated."""
        work = 0.0
        if self.walks:  # the embedding's update: its gradient, what it becomes, and random bits
            return FLOAT * self.decoder_numbers, 0.0, 2 * FLOAT * self.decoder_numbers
        if self.config.optim.traits.spectral:  # the direction, before and after an iteration, in bfloat16 on GPUs
            work = 2 * (2 if self.fused else FLOAT) * self.parameters.blocks / self.shards(1)
        return max(self.accumulated, self.all_gradients), 0.0, work

    # ---- activations, in bytes of a microbatch

    @property
    def kept(self) -> float:
        """What the forward pass keeps of all blocks, on the device."""
        remat = self.config.train.remat
        if remat == "offload":
            return 0.0
        # Recomputing blocks whole keeps what each step of the walk reads: the first block of a period.
        return (self.repeats if remat == "full" else self.config.model.layers) * self.kept_of_block(remat)

    def kept_of_block(self, remat: str) -> float:
        """What the forward pass keeps of one block under a policy."""
        model, sizes, size, made = self.config.model, self.sizes, self.compute_bytes, self.feed_forward
        up, inner = made.up, sizes.heads * sizes.head_dim
        stream, sandwiched = model.width, 2 * model.width * (model.norm_position == "sandwich")
        if remat == "full":
            return self.tokens * size * stream
        if remat in ("selective", "offload"):  # the stream, and the products that are read again: see `model/remat.py`
            return self.tokens * size * (2 * stream + sandwiched + sum(sizes.qkv) + up + made.down)
        norms = 4 * stream + sandwiched  # what each reads, and what the product after it reads
        queries_and_keys = model.qk_norm * (sizes.qkv[0] + sizes.qkv[1])
        # The attention's result is kept twice by a scan: by itself, and as rows by the product after it.
        attention = queries_and_keys + self.operands + (1 if self.unrolled else 2) * inner
        skip = model.embedding_skip * stream
        masks = 2 * stream / size if model.dropout else 0  # one byte per entry
        numbers = norms + attention + up + made.mlp + made.sent + skip + masks
        return self.tokens * (size * numbers + FLOAT * (sizes.heads + made.routed))

    @cached_property
    def repeats(self) -> int:
        """Steps of a walk over the stack."""
        return repeats_of(self.config.model)

    @property
    def period(self) -> int:
        """Blocks of one step."""
        return self.config.model.layers // self.repeats

    @property
    def operands(self) -> float:
        """Queries, keys and values that attention keeps of a token, in numbers."""
        queries, keys, values = self.sizes.qkv
        return queries + self.repeated_keys * (keys + values)

    @property
    def block_workspace(self) -> float:
        """The most that the backward pass of one block holds at a time, beside the stream's gradient and what is kept.

        Of the feed-forward layer: gradients of both its products. Of attention: gradients of the stream, of what its
        last product reads, and of its operands. A scan copies out of its stacks what a block has kept, when it comes to
        it; recomputation makes it again.
        """
        sizes, size, remat = self.sizes, self.compute_bytes, self.config.train.remat
        made, width, inner = self.feed_forward, self.config.model.width, sizes.heads * sizes.head_dim
        up = made.up
        mlp = self.product_bytes * (up + made.mlp + made.sent)
        by_operands = self.operands + (0 if self.fused else sum(sizes.qkv))  # each chunk's, then put together
        attention = size * (width + inner + by_operands) + self.score_bytes
        if remat == "none":
            copied = 0 if self.unrolled else self.period * self.kept_of_block("none") / self.tokens
            return self.masks + self.tokens * (max(mlp, attention) + copied)
        # The activation's result is made late, when only its weights' gradient wants it.
        again = self.kept_of_block("none") / self.tokens - size * made.mlp
        again -= size * inner * (not self.unrolled)  # the second copy
        if remat == "full":  # of all blocks of a period at once
            again += (self.period - 1) * self.kept_of_block("none") / self.tokens
        # XLA computes attention again before the feed-forward layer's gradients are done where what comes from the host
        # is its operands; with a Hopper card's timings, where they are made of it.
        hopper = self.gpu is not None and self.gpu.capability[0] == 9
        if remat == "full" or (remat == "offload" and self.plain_operands != hopper):
            # What belongs to the feed-forward layer is gone when attention's own backward pass begins.
            mlp, attention = mlp + again + self.widened, attention + again - size * (up + 2 * width)
            return self.masks + self.tokens * max(mlp, attention)
        # The attention's result is there: its operands are computed again after the feed-forward layer.
        mlp += size * (3 * width + up)
        attention += again + size * (up - 2 * width)
        if self.walks or remat == "offload":
            # A walk visits each matrix's gradient before it goes on, and what comes from the host comes late.
            attention -= size * (up + width)
        return self.masks + self.tokens * max(mlp, attention)

    @property
    def plain_operands(self) -> bool:
        """Whether attention's operands are what products give, with nothing between."""
        return not self.config.model.qk_norm and self.config.model.positions != "rotary"

    @property
    def widened(self) -> float:
        """What XLA adds in float32, per token, to a block computed again, where products are float32."""
        if self.fused:
            return 0.0
        model, sizes = self.config.model, self.sizes
        stops = not self.method.accumulates
        numbers = sizes.gated * self.feed_forward.mlp  # a gate's part of the derivative
        if self.walks and not stops and self.plain_operands:  # gradients leave together: scores are computed meanwhile
            numbers += sizes.heads * self.pairs
        if stops and len(self.visible_keys) == 1:  # what waits for a walk to visit a gradient is rounded
            return FLOAT * numbers
        # Of what products read: the norms' results, attention's and the stream's gradient. Where they are rounded, but
        # attention is in chunks of many sizes, the gaps between its buffers are as large.
        norms = 2 * model.width
        return FLOAT * (numbers + norms + sizes.heads * sizes.head_dim + model.width) - self.compute_bytes * norms

    @property
    def product_bytes(self) -> int:
        """Of a number that a product gives: without tensor cores for bfloat16 it is float32, and rounded afterwards."""
        return self.compute_bytes if self.fused else FLOAT

    @property
    def walks(self) -> bool:
        """Whether the backward pass is `train/walk.py`'s, which keeps no gradients."""
        return not self.method.accumulates or self.method.on_host

    @property
    def fused(self) -> bool:
        """Whether kernels for GPUs run: else attention is XLA's, in chunks of queries."""
        return self.gpu is not None and self.gpu.has_bfloat16

    @cached_property
    def visible_keys(self) -> list[int]:
        """Keys that each chunk of queries reads, where attention is XLA's."""
        mask = Mask(self.config.objective.causal, widest_window(self.config.model))
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
        again = self.config.train.remat in ("full", "offload") and not self.method.on_host
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
        skips = Mask(self.config.objective.causal, widest_window(self.config.model)).skips
        if self.fused or self.unrolled or not skips or not self.method.accumulates:
            return 0.0
        return self.tokens * self.sizes.heads * self.pairs * (FLOAT + 1)

    @property
    def stream(self) -> float:
        """The residual stream, or its gradient."""
        return self.tokens * self.compute_bytes * self.config.model.width

    @property
    def ends(self) -> float:
        """What norms before the first block and after the last one read."""
        model = self.config.model
        return self.stream * (model.embedding_norm + model.final_norm)

    # ---- the head

    @property
    def logits(self) -> float:
        """What the head's loss holds: a tile of logits, and the decoder in the compute precision, twice."""
        # The head, and each tail of an adaptive softmax, which takes all tokens where it has not room for its own.
        heads = [(self.config.model.width, self.sizes.decoder), *self.sizes.tails]
        return max(self.logits_of(width, columns) for width, columns in heads)

    def logits_of(self, width: int, columns: int) -> float:
        """What the loss of one head holds."""
        size, tokens = self.compute_bytes, self.predicted
        logits = self.logit_bytes * tokens / self.tiles_of(columns) * columns
        # What it reads, and the gradient by it.
        return logits + 2 * size * (width * columns + tokens * width)

    @property
    def logit_bytes(self) -> int:
        """Of a logit and of its gradient: a kernel writes one over the other, XLA reads and writes float32."""
        return self.compute_bytes if self.fused else 2 * FLOAT

    @property
    def tiles(self) -> int:
        """Tiles of the head's loss."""
        return self.tiles_of(self.sizes.decoder)

    def tiles_of(self, columns: int) -> int:
        """Tiles that a loss is taken in, as `kernels/cross_entropy/fused.py` cuts them."""
        if self.gpu is None:
            return tile_count(self.predicted, columns, FLOAT, None)
        return tile_count(self.predicted, columns, self.compute_bytes, self.gpu.memory)

    @property
    def decoder_numbers(self) -> int:
        """Entries of the decoder: the embedding if they are tied, and the tails of an adaptive softmax."""
        tails = sum(narrow * (self.config.model.width + tokens) for narrow, tokens in self.sizes.tails)
        return self.config.model.width * self.sizes.decoder + tails

    # ---- the host

    def host(self) -> dict[str, int]:
        """Host bytes by kind, of all devices: as `train/offload.py` and `model/remat.py` send them there."""
        train = self.config.train
        data = train.data_parallel or 1
        host = self.method.host_bytes(self.config, self.parameters.total, data)
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
    def model(self) -> Model:
        """What is trained."""
        return build_model(self.config, Vocabulary(self.vocab_size, 0, 0), self.compute_dtype)

    @cached_property
    def trained(self) -> ParameterCount:
        """Those that are trained; the others have no gradient and no optimizer state."""
        if not self.config.train.freeze and self.config.adapter is None:
            return self.parameters
        params, _ = split(self.model.abstract_params(), untrained(self.model, self.config.train.freeze))
        parts = ("embed", "blocks", "head")
        return ParameterCount(*(sum(x.size for x in jax.tree.leaves(params[part])) for part in parts))

    @cached_property
    def sizes(self) -> Sizes:
        """Shapes of the parameters."""
        return sizes_of(self.config.model, self.vocab_size, self.config.data.sequence_length)

    @cached_property
    def feed_forward(self) -> FeedForward:
        """What a token is to the feed-forward layer, or the experts, of a block."""
        return feed_forward(self.config.model, self.sizes, self.tokens, "cpu" if self.gpu is None else "gpu")

    @property
    def length(self) -> int:
        """Tokens of a sequence, those of a prompt included."""
        adapter = self.config.adapter
        prompt = adapter.virtual_tokens if adapter is not None and adapter.kind == "prompt" else 0
        return self.config.data.sequence_length + prompt

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
        return self.tokens // self.length * self.config.objective.predicted(self.length)

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
        train = self.config.train
        return not self.walks and unrolls(train.layer_loop, self.config.model.layers, train.remat, kernels=self.fused)

    def shards(self, stage: int) -> int:
        """Parts that a state is cut into: ZeRO's stages shard optimizer (1), gradients (2) and weights (3)."""
        return self.config.train.fsdp if self.config.train.zero >= stage else 1
