"""Seconds of a training step, from its configuration alone, and what a budget of any kind then buys.

A roofline: matrix products at a stated share of the device's peak, everything else at a stated share of its memory's
bandwidth, one after the other. The shares are assumptions (`UTILISATION`), not measurements; where the planner runs on
the CPU that is to train, it times the real step instead (`cramjax.planning.measure`).
"""

import dataclasses
import math
from dataclasses import dataclass

from cramjax.budget import Budget, Unit
from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.model import count_parameters
from cramjax.model.sizes import sizes_of
from cramjax.optim import batch_size_at
from cramjax.train.parts import flops_per_token

CHINCHILLA_TOKENS = 20.0
"""Tokens per parameter at which a compute budget is best spent, about (Hoffmann et al. 2022, arXiv:2203.15556)."""


@dataclass(frozen=True)
class Utilisation:
    """Shares of a device's figures that a step is assumed to reach."""

    products: float
    """Of the peak of matrix products."""
    bandwidth: float = 0.85
    """Of the memory's bandwidth, in passes over arrays."""
    host: float = 0.8
    """Of the link to the host."""

    def __str__(self) -> str:
        return f"{self.products:.0%} of peak products, {self.bandwidth:.0%} of bandwidth, {self.host:.0%} of PCIe"


# The higher a peak stands above what its memory feeds, the less of it is reached. Assumed, not measured: no card was at
# hand. Crammed BERT on an A6000 comes out within a fifth of what its authors report (tests/planning/test_speed.py).
UTILISATION = {
    7: Utilisation(0.75),
    8: Utilisation(0.75),
    9: Utilisation(0.55),
    10: Utilisation(0.45),
    12: Utilisation(0.7),
}

# Bytes per second at which a host reads and writes its memory in an optimizer step: two channels of DDR4 or more.
HOST_MEMORY_BANDWIDTH = 30e9


@dataclass(frozen=True)
class Speed:
    """How long the parts of training take."""

    microbatch_seconds: float
    """Forward and backward pass of one microbatch."""
    update_seconds: float
    """What is done once a step: the optimizer, and sums over devices."""
    microbatch_tokens: int
    flops_per_token: float
    """Model FLOPs, forward and backward."""
    peak_flops: float
    """Of all devices, in the compute precision."""
    start_seconds: float = 0.0
    """Making the state and compiling."""
    source: str = ""
    """What the seconds rest on."""

    def tokens_per_second(self, microbatches: int) -> float:
        """Speed of steps of so many microbatches."""
        return microbatches * self.microbatch_tokens / self.step_seconds(microbatches)

    def step_seconds(self, microbatches: int) -> float:
        """A step of so many microbatches."""
        return microbatches * self.microbatch_seconds + self.update_seconds


@dataclass(frozen=True)
class Purchase:
    """What a budget buys."""

    tokens: float
    steps: float
    seconds: float
    flops: float
    """Model FLOPs."""
    tokens_per_second: float
    """Over the whole budget: starting and evaluating included."""
    chinchilla: float
    """Tokens, as a share of those at which this model would be the best use of its compute."""
    epochs: float | None
    """Times the data is read; None where it is not known how much there is."""
    cost: float | None
    """Price of the time."""


def estimate_speed(config: RunConfig, *, vocab_size: int, compute_dtype: str, gpu: Gpu, devices: int = 1) -> Speed:
    """Seconds of a configuration's step on a card, by roofline.

    Args:
        config: the run, with its microbatch (of all devices together).
        vocab_size: tokens of its vocabulary.
        compute_dtype: precision of products.
        gpu: the card.
        devices: cards that share a microbatch.
    """
    return _Roofline(config, vocab_size, compute_dtype, gpu, devices).speed()


@dataclass(frozen=True)
class _Roofline:
    config: RunConfig
    vocab_size: int
    compute_dtype: str
    gpu: Gpu
    devices: int

    def speed(self) -> Speed:
        """Each part of a step at its roof."""
        config, gpu, use = self.config, self.gpu, UTILISATION[self.gpu.capability[0]]
        tokens = (config.batch.microbatch or config.batch.size) * config.data.sequence_length
        share = tokens / self.devices
        peak = gpu.peak_flops(self.compute_dtype)
        products = share * self._flops_per_token() / (peak * use.products)
        passes = (share * self._bytes_per_token() + self._bytes_of_weights()) / (gpu.bandwidth * use.bandwidth)
        microbatch = products + passes
        link = gpu.host_bandwidth * use.host
        if config.train.remat == "offload":  # there and back, beside the computation
            microbatch = max(microbatch, 2 * share * self._offloaded_bytes() / link)
        update = self._update_seconds(gpu.bandwidth * use.bandwidth, link)
        if config.train.offload_optimizer and config.train.delay_update is not None:
            # The host works while the device does, and the device then waits for what is left of it.
            microbatches = config.batch.size / (config.batch.microbatch or config.batch.size)
            update = max(0.0, update - microbatches * microbatch)
        if self.devices > 1:  # every gradient is summed over a ring, and by ZeRO-3 weights are gathered twice
            gathered = config.train.fsdp > 1 and config.train.zero == 3
            update += 2 * (self.devices - 1) / self.devices * self._parameter_count * 4 / link
            microbatch += gathered * 2 * self._parameter_count * self._compute_bytes / link
        return Speed(
            microbatch_seconds=microbatch,
            update_seconds=update,
            microbatch_tokens=tokens,
            flops_per_token=flops_per_token(config, self.vocab_size),
            peak_flops=peak * self.devices,
            source=f"roofline of the data sheet, assuming {use}",
        )

    def _flops_per_token(self) -> float:
        """FLOPs done for each token: the model's, and those of what the backward pass computes again."""
        total = flops_per_token(self.config, self.vocab_size)
        model = self.config.model
        blocks = flops_per_token(_with(self.config, layers=2 * model.layers), self.vocab_size) - total
        sizes = sizes_of(model, self.vocab_size, self.config.data.sequence_length)
        inner = sizes.heads * sizes.head_dim
        products = model.width * (sum(sizes.qkv) + inner + sum(sizes.up) + model.mlp)
        attention = blocks - 6.0 * model.layers * products
        again = {"none": 0.0, "selective": attention / 3, "offload": attention / 3, "full": blocks / 3}
        backward = 2 / 3 * total + again[self.config.train.remat]
        # LOMO's clipping walks back once more, for the norm alone.
        walks = 2 if self.config.optim.name == "lomo" and self.config.optim.clip is not None else 1
        return total / 3 + walks * backward

    def _bytes_per_token(self) -> float:
        """Device memory read and written for each token of a microbatch, beside the operands of products.

        Products leave float32, which is read once to be rounded; what is kept is written and read twice; gradients of
        activations likewise; logits are passed over five times.
        """
        model, size = self.config.model, self._compute_bytes
        sizes = sizes_of(model, self.vocab_size, self.config.data.sequence_length)
        qkv, up, inner = sum(sizes.qkv), sum(sizes.up), sizes.heads * sizes.head_dim
        outputs = qkv + up + 2 * model.width
        inputs = model.mlp + inner + 2 * model.width
        kept = 4 * model.width + qkv + inner + up + model.mlp
        forward = 8 * outputs + 2 * size * kept
        backward = 8 * inputs + 2 * size * kept + 3 * size * (up + qkv + 2 * model.width)
        if not self.gpu.has_bfloat16:  # scores of all pairs, in float32: written and read in both passes
            backward += 6 * 4 * sizes.heads * min(self.config.data.sequence_length, model.window or math.inf)
        again = {"none": 0.0, "selective": 0.5, "offload": 0.5, "full": 1.0}[self.config.train.remat] * forward
        predicted = 1.0 if self.config.objective.kind == "causal" else self.config.objective.mask_rate
        return model.layers * (forward + backward + again) + 5 * 4 * predicted * sizes.decoder

    def _bytes_of_weights(self) -> float:
        """Read and written once a microbatch: weights rounded, twice read; gradients written, added up."""
        accumulating = self.config.batch.size != (self.config.batch.microbatch or self.config.batch.size)
        return self._parameter_count * (4 + 3 * self._compute_bytes + 8 + 12 * accumulating)

    def _offloaded_bytes(self) -> float:
        """Bytes per token that `offload` sends to the host: the stream and the products, see `model/remat.py`."""
        model = self.config.model
        sizes = sizes_of(model, self.vocab_size, self.config.data.sequence_length)
        return model.layers * self._compute_bytes * (2 * model.width + sum(sizes.qkv) + sum(sizes.up))

    def _update_seconds(self, bandwidth: float, link: float) -> float:
        """The optimizer's step: its state read and written; on the host, behind its transfers."""
        optim, train = self.config.optim, self.config.train
        shards = max(1, train.fsdp)
        if train.offload_optimizer:  # gradients down, weights up, 2 bytes each; Adam reads and writes 28 on the host
            moved = 2 * 2 * self._parameter_count / shards / link
            return moved + 28 * self._parameter_count / HOST_MEMORY_BANDWIDTH
        moments = {"adamw": 2, "muon": 1.2, "adan": 4, "lion": 1, "sophia": 2, "schedule_free_adamw": 2}
        numbers = 4 + 2 * moments.get(optim.name, 0)  # the norm's pass; weights and gradient; each moment twice
        seconds = 4 * numbers * self._parameter_count / shards / bandwidth
        if optim.name == "muon":
            use = UTILISATION[self.gpu.capability[0]].products
            seconds += self._newton_schulz_flops() / (self.gpu.float32_flops * use) / shards
        return seconds

    def _newton_schulz_flops(self) -> float:
        model, total = self.config.model, 0.0
        sizes = sizes_of(model, self.vocab_size, self.config.data.sequence_length)
        inner = sizes.heads * sizes.head_dim
        shapes = [*((model.width, w) for w in sizes.qkv), (inner, model.width)]
        shapes += [*((model.width, w) for w in sizes.up), (model.mlp, model.width)]
        for rows, columns in shapes:
            small, large = min(rows, columns), max(rows, columns)
            if large > 1.5 * small:  # on the Gram matrix: five products of it an iteration
                total += self.config.optim.newton_schulz_steps * 10.0 * small**3 + 4.0 * small**2 * large
            else:
                total += self.config.optim.newton_schulz_steps * (4.0 * small**2 * large + 2.0 * small**3)
        return model.layers * total

    @property
    def _parameter_count(self) -> int:
        return count_parameters(self.config.model, self.vocab_size, self.config.data.sequence_length).total

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.compute_dtype == "bfloat16" else 4


def _with(config: RunConfig, **model: int) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def what_it_buys(
    config: RunConfig,
    speed: Speed,
    budget: Budget,
    *,
    parameters: int,
    tokens_per_epoch: float | None = None,
    price: float | None = None,
) -> Purchase:
    """What a budget buys at a speed.

    Starting, compiling and the evaluations within the run are charged to a budget of time, as the run's clock does; an
    evaluation takes a third of training for each token, for want of a backward pass. Where time is short, the run
    leaves evaluations out: there is one at most for each step.

    Args:
        config: the run: its batch, ramp and evaluations.
        speed: of its steps.
        budget: what is spent.
        parameters: of the model.
        tokens_per_epoch: training tokens in the data, if known.
        price: of an hour.
    """
    microbatches = config.batch.size // (config.batch.microbatch or config.batch.size)
    top = speed.tokens_per_second(microbatches)
    evaluation, evaluations = config.evaluate.tokens / (3 * top), max(0, config.evaluate.points - 1)
    if budget.unit == "seconds":
        each = evaluation + speed.step_seconds(microbatches)
        evaluations = min(evaluations, max(0.0, budget.amount - speed.start_seconds) / each)
    overhead = speed.start_seconds + evaluations * evaluation
    mean, mean_step = _over_ramp(config, speed, microbatches, budget.unit)
    match budget.unit:
        case "seconds":
            tokens = max(0.0, budget.amount - overhead) * mean
        case "tokens":
            tokens = budget.amount
        case "flops":
            tokens = budget.amount / speed.flops_per_token
        case "steps":
            tokens = budget.amount * mean_step
    seconds = budget.amount if budget.unit == "seconds" else tokens / mean + overhead
    return Purchase(
        tokens=tokens,
        steps=tokens / mean_step,
        seconds=seconds,
        flops=tokens * speed.flops_per_token,
        tokens_per_second=tokens / seconds,
        chinchilla=tokens / (CHINCHILLA_TOKENS * parameters),
        epochs=None if tokens_per_epoch is None else tokens / tokens_per_epoch,
        cost=None if price is None else price * seconds / 3600,
    )


def smallest_budget(config: RunConfig, speed: Speed, unit: Unit) -> Budget:
    """What starting and the first step take, of one resource.

    Args:
        config: the run: its batch and ramp.
        speed: of its steps.
        unit: the resource.
    """
    microbatch = config.batch.microbatch or config.batch.size
    microbatches = 1 if config.batch.ramp else config.batch.size // microbatch
    tokens = float(microbatches * speed.microbatch_tokens)
    match unit:
        case "seconds":
            return Budget(speed.start_seconds + speed.step_seconds(microbatches), unit)
        case "tokens":
            return Budget(tokens, unit)
        case "flops":
            return Budget(tokens * speed.flops_per_token, unit)
        case "steps":
            return Budget(1.0, unit)


def _over_ramp(config: RunConfig, speed: Speed, microbatches: int, unit: str, points: int = 200) -> tuple[float, float]:
    """Mean tokens per second over the budget, and mean tokens of a step, while the batch grows.

    The batch is a function of the spent fraction, and so is the mean: over equal parts of the budget.
    """
    tokens, steps, seconds = 0.0, 0.0, 0.0
    for point in range(points):
        count = batch_size_at(config.batch, (point + 0.5) / points) * microbatches // config.batch.size
        step_seconds = speed.step_seconds(count)
        step_tokens = speed.tokens_per_second(count) * step_seconds
        # Steps in this part: those that spend as much of the budget as each other part does.
        share = {"seconds": 1 / step_seconds, "steps": 1.0}.get(unit, 1 / step_tokens)
        tokens += share * step_tokens
        steps += share
        seconds += share * step_seconds
    return tokens / seconds, tokens / steps
