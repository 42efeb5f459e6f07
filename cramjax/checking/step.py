"""A small training step, as a run of gpt-mini makes it: how long it takes to compile, its speed, and that it learns."""

import time
from dataclasses import dataclass

import jax
import numpy as np

from cramjax import devices
from cramjax.checking.kernels import in_turns
from cramjax.planning.measure import zipf_tokens
from cramjax.planning.steps import program_here
from cramjax.recipes import load_recipe
from cramjax.training.parts import Vocabulary
from cramjax.training.step import Batch

_RECIPE = "gpt-mini"


@dataclass(frozen=True)
class Step:
    """What came of a training step on one device."""

    recipe: str
    parameters: int
    tokens: int
    """Of a step."""
    dtype: str
    """Precision of its products."""
    trace_seconds: float
    compile_seconds: float
    """Of the step alone, whatever a compilation cache holds of it."""
    seconds: float
    """Median of a step."""
    peak_share: float | None
    """Share of the device's peak FLOP/s; None where that is not known."""
    losses: tuple[float, float]
    """In nats a token, of the first step and the last, all on the same tokens."""

    @property
    def wrong(self) -> bool:
        """Whether the loss did not fall, which it does on tokens seen before."""
        return not self.losses[1] < self.losses[0]


def small_step() -> Step:
    """Compile and time the step of gpt-mini, on tokens as frequent as a text's."""
    config = load_recipe(_RECIPE, {"train.data_parallel": 1})
    started = time.perf_counter()
    program = program_here(config, Vocabulary(config.tokenizer.vocab_size, separator_id=0, mask_id=1))
    traced = time.perf_counter()
    compiled = program.step.compile()
    ready = time.perf_counter()
    state, parts, like = program.create(), program.parts, program.batch.tokens
    drawn = jax.device_put(zipf_tokens(config.tokenizer.vocab_size, like.shape), like.sharding)
    batch, metrics = Batch(drawn, np.int32(like.shape[0])), None  # pyright: ignore[reportArgumentType]

    def step() -> jax.Array:
        nonlocal state, metrics
        state, metrics = compiled(state, batch, np.float32(0.5))
        return metrics.loss

    first = float(step())
    seconds = in_turns({"": step}, seconds=0.5)[""]
    last = float(step())
    tokens = config.batch.size * config.data.sequence_length
    peak = devices.peak_flops(jax.devices()[0], parts.model.compute_dtype)
    return Step(
        recipe=_RECIPE,
        parameters=parts.parameters,
        tokens=tokens,
        dtype=parts.model.compute_dtype,
        trace_seconds=traced - started,
        compile_seconds=ready - traced,
        seconds=seconds,
        peak_share=None if peak is None else parts.flops_per_token * tokens / seconds / peak,
        losses=(first, last),
    )
