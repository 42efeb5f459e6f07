"""Seconds of a training step, from its configuration alone, and what a budget of any kind then buys.

A roofline: matrix products at a stated share of the device's peak, everything else at a stated share of its memory's
bandwidth, one after the other (`UTILISATION` says which shares were measured). Where the planner runs on the CPU that
is to train, it times the real step instead (`cramjax.planning.measure`).
"""

from dataclasses import dataclass

from cramjax.budget import Budget, Unit
from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.optim import batch_size_at
from cramjax.planning.work import StepWork, Work
from cramjax.training.methods import method_of
from cramjax.training.parts import flops_per_token

CHINCHILLA_TOKENS = 20.0
"""Tokens per parameter at which a compute budget is best spent, about (Hoffmann et al. 2022, arXiv:2203.15556)."""


@dataclass(frozen=True)
class Utilisation:
    """Shares of a device's figures that a step is taken to reach."""

    products: float
    """Of the peak of matrix products, by large ones."""
    bandwidth: float = 0.9
    """Of the memory's bandwidth, by passes over arrays."""
    exposed: float = 0.3
    """Of the time in which products read and write, what does not hide behind their arithmetic."""
    attention: float = 0.5
    """Of the peak of matrix products, by attention over long sequences."""
    host: float = 0.8
    """Of the link to the host."""
    source: str = "these shares are assumed"

    def __str__(self) -> str:
        return (
            f"{self.products:.0%} of peak products, {self.bandwidth:.0%} of bandwidth, {self.host:.0%} of PCIe "
            f"({self.source})"
        )


# Hopper's are measured, on one H100: 706 of 989 TFLOP/s by a product of 8192³, 3.02 of 3.35 TB/s by a copy, 54 of 63
# GB/s over PCIe; the other two fit what a profile says of products, and attention by itself. With them the three steps
# that were timed come out within a tenth (tests/planning/test_speed.py). Of other generations nothing was measured: the
# higher a peak stands above what its memory feeds, the less of it is reached.
UTILISATION = {
    7: Utilisation(0.75),
    8: Utilisation(0.75),
    9: Utilisation(0.71, host=0.86, source="these shares were measured on an H100"),
    10: Utilisation(0.6),
    12: Utilisation(0.75),
}

_HALF_KEYS = 700
"""Keys that a query sees where attention is half as fast as over long sequences: fitted to five shapes on an H100."""

COMPILE_SECONDS = 14.0
"""That a step takes to compile for a GPU: 124M parameters unrolled over 12 layers, and 1.3B scanned, on an H100."""
_COMPILE_SECONDS_OF_LAYER = 0.5
"""For each unrolled layer beyond these 12."""

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
    step = StepWork(config, vocab_size, compute_dtype, gpu, devices)
    use, parameters = UTILISATION[gpu.capability[0]], step.parameters
    microbatch = seconds_of(step.microbatch, gpu, compute_dtype)
    link = gpu.host_bandwidth * use.host
    if config.train.remat == "offload":  # there and back, beside the computation
        microbatch = max(microbatch, 2 * step.offloaded_bytes / link)
    update = _update_seconds(step, link)
    if method_of(config).on_host and config.train.delay_update is not None:
        # The host works while the device does, and the device then waits for what is left of it.
        microbatches = config.batch.size / (config.batch.microbatch or config.batch.size)
        update = max(0.0, update - microbatches * microbatch)
    if devices > 1:  # every gradient is summed over a ring, and by ZeRO-3 weights are gathered twice
        gathered = config.train.fsdp > 1 and config.train.zero == 3
        update += 2 * (devices - 1) / devices * parameters * 4 / link
        microbatch += gathered * 2 * parameters * step.compute_bytes / link
    return Speed(
        microbatch_seconds=microbatch,
        update_seconds=update,
        microbatch_tokens=(config.batch.microbatch or config.batch.size) * config.data.sequence_length,
        flops_per_token=flops_per_token(config, vocab_size),
        peak_flops=gpu.peak_flops(compute_dtype) * devices,
        start_seconds=_compile_seconds(config, step.unrolled),
        source=f"roofline of the data sheet, at {use}",
    )


def seconds_of(work: Work, gpu: Gpu, compute_dtype: str) -> float:
    """Seconds that a card takes for some work: products, attention and passes, one after the other.

    Args:
        work: of the device.
        gpu: the card.
        compute_dtype: precision of products.
    """
    use, peak = UTILISATION[gpu.capability[0]], gpu.peak_flops(compute_dtype)
    bandwidth = gpu.bandwidth * use.bandwidth
    products = work.product_flops / (peak * use.products) + use.exposed * work.product_bytes / bandwidth
    attention = work.attention_flops / (peak * use.attention * work.keys / (work.keys + _HALF_KEYS))
    return products + attention + work.passes / bandwidth


def _update_seconds(step: StepWork, link: float) -> float:
    """The optimizer's step: its state read and written; on the host, behind its transfers."""
    gpu, shards = step.gpu, max(1, step.config.train.fsdp)
    use = UTILISATION[gpu.capability[0]]
    if method_of(step.config).on_host:  # gradients down, weights up, 2 bytes each; Adam reads and writes 28 there
        moved = 2 * 2 * step.parameters / shards / link
        return moved + 28 * step.parameters / HOST_MEMORY_BANDWIDTH
    seconds = step.update_passes / (gpu.bandwidth * use.bandwidth)
    if step.config.optim.traits.spectral:
        seconds += step.newton_schulz_flops / (gpu.peak_flops("bfloat16") * use.products)
    return seconds / shards


def _compile_seconds(config: RunConfig, unrolled: bool) -> float:
    return COMPILE_SECONDS + _COMPILE_SECONDS_OF_LAYER * max(0, config.model.layers - 12) * unrolled


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
        parameters: of the model, that have a part in what is computed of a token.
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
