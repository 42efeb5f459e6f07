"""The buffers of a training step on a CPU, whose program XLA lays out another way.

Its scheduler runs everything as soon as its operands are there. In an unrolled stack that is, before the backward pass
begins: the transposed operands of its products, attention's probabilities, what the non-linearity's derivative reads.
What a scan has kept in bfloat16 is then there in float32, in which the backward pass reads it (not so by the compiler
of jax 0.12). The peak is at the head.
"""

from cramjax.kernels.attention.xla import MOST_KEPT_KEYS
from cramjax.planning.buffers import FLOAT, OLDER_XLA, Step

# float32 arrays, each as wide as the feed-forward layer, that a non-linearity's derivative shares with its value.
_SHARED = {"relu2": 0, "gelu_tanh": 1, "swiglu": 2, "gelu": 2, "geglu": 3, "geglu_tanh": 2}


class CpuStep(Step):
    """One training step on a CPU."""

    def kept_of_block(self, remat: str) -> float:
        """What there is of a block when the backward pass begins."""
        if not self.unrolled:
            softmax = self.tokens * self.compute_bytes * self.kept_pairs if remat == "none" else 0
            return super().kept_of_block(remat) + softmax
        model, sizes, size, made = self.config.model, self.sizes, self.compute_bytes, self.feed_forward
        queries, keys, values = sizes.qkv
        # Transposed: what the three products of the stream read, and queries. Values: as each chunk reads them.
        attention = 2 * queries + keys + self.repeated_keys * values
        numbers = (
            (7 if model.norm_position == "sandwich" else 5) * model.width + attention + made.up + made.mlp + made.sent
        )
        centred = 1 + (model.norm == "layernorm" or model.norm_affine)
        wide = centred * model.width + _SHARED[model.activation] * made.mlp + made.routed
        recomputed = sizes.heads * self.pairs - self.kept_pairs
        wide += model.qk_norm * (queries + keys) + recomputed
        rounded = self.kept_pairs + recomputed * (size < FLOAT)
        return self.tokens * (size * (numbers + rounded) + FLOAT * wide)

    @property
    def kept_pairs(self) -> float:
        """Numerators of the softmax that attention keeps for each token."""
        kept = sum(keys for keys in self.visible_keys if keys <= MOST_KEPT_KEYS) / sum(self.visible_keys)
        return self.sizes.heads * self.pairs * kept

    @property
    def kept(self) -> float:
        """What there is of all blocks."""
        wide = FLOAT / self.compute_bytes if OLDER_XLA and not self.unrolled else 1.0
        return super().kept * wide

    @property
    def logit_bytes(self) -> int:
        """Of a logit, float32, and of its gradient."""
        return FLOAT + self.compute_bytes

    @property
    def copied_experts(self) -> float:
        """Matrices of experts, cut out of their stacks for loops to read, and rounded in both passes; and gradients."""
        size = self.compute_bytes
        steps = 1 if self.unrolled else self.repeats
        return 2 * (FLOAT + size * (size < FLOAT)) * self.parameters.experts / steps

    @property
    def block_workspace(self) -> float:
        """The most that the backward pass of one block holds at a time; of experts, a scan copies one step's."""
        return super().block_workspace + (0.0 if self.unrolled else self.copied_experts)

    def at_head(self) -> tuple[float, float, float]:
        """The head's phase, with what the others will write into: gradients of tables, the mask, rounded weights."""
        size, width = self.compute_bytes, self.config.model.width
        tables = self.trained.embedding >= width * self.sizes.vocab
        lookup = FLOAT * width * (self.sizes.vocab + self.tokens) * tables  # its gradients
        work = self.logits + max(lookup, self.widening)
        work += self.tokens * width * (4 * size + FLOAT)  # around the head and the embedding, transposed as well
        if self.sizes.tails:  # the gradient of the short head's logits
            work += size * self.predicted * self.sizes.decoder
        if self.unrolled:
            work += FLOAT * self.sizes.heads * self.pairs * self.tokens
            work += size * self.parameters.blocks * (size < FLOAT)
            work += self.copied_experts
        trained = tables if self.config.model.tied else self.trained.head >= self.decoder_numbers
        return self.accumulated + FLOAT * self.decoder_numbers * trained, self.kept, work

    @property
    def widening(self) -> float:
        """The largest stack of what a scan has kept, while it becomes float32; gradients of tables take its place."""
        if self.unrolled or not OLDER_XLA or self.compute_bytes == FLOAT:
            return 0.0
        widest = self.config.model.width if self.config.train.remat == "full" else self.feed_forward.up
        return self.compute_bytes * self.tokens * self.repeats * widest
