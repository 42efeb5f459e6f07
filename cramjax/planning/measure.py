"""The CPU there is, measured: memory bandwidth once for all, and the real step of a configuration once for each."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax import devices
from cramjax.cache import cache_directory, write_atomically
from cramjax.compiling import keep_programs
from cramjax.config import RunConfig
from cramjax.planning.speed import Speed
from cramjax.planning.steps import program_here
from cramjax.recipes import to_yaml
from cramjax.start import start
from cramjax.training.parts import Vocabulary
from cramjax.training.step import Batch

MEASURE_SECONDS = 4.0
"""Time given to steps of one microbatch, and half of it to steps of two."""


def measured_speed(config: RunConfig, vocabulary: Vocabulary) -> Speed:
    """Speed of a configuration on this CPU: its real step, compiled, timed on tokens drawn by Zipf's law, then cached.

    The cache is keyed by everything that shapes the step: configuration, CPU, CramJAX's source and jax's version.
    Programs go to the cache that training reads, so the run that follows compiles no step, and none is counted to its
    start.

    Args:
        config: the run, with its microbatch.
        vocabulary: its size and special tokens.
    """
    path = cache_directory(config.data.cache_dir) / "speeds.json"
    key = _key(config, vocabulary)
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if key not in known:
        known[key] = dataclasses.asdict(_measure(config, vocabulary))
        write_atomically(path, json.dumps(known, indent=1))
    return Speed(**known[key])


def zipf_tokens(vocab_size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens as frequent as a text's: by Zipf's law, the share of the token of rank r is about 1/r.

    Ids are ranks, nearly, in vocabularies that are trained by merging. It matters: how long an adaptive softmax takes
    depends on how many tokens are rare.

    Args:
        vocab_size: tokens to draw from.
        shape: of what is returned.
    """
    uniform = np.random.default_rng(0).random(shape)
    return np.minimum(np.exp(uniform * np.log(vocab_size + 1)) - 1, vocab_size - 1).astype(np.int32)


def _key(config: RunConfig, vocabulary: Vocabulary) -> str:
    plain = RunConfig()
    shape = dataclasses.replace(
        config,
        budget=plain.budget,
        seed=0,
        data=dataclasses.replace(plain.data, sequence_length=config.data.sequence_length),
        train=dataclasses.replace(config.train, memory="as_given", log_points=1, profile=False, prefetch=1),
        evaluate=plain.evaluate,
        checkpoint=plain.checkpoint,
    )
    start()
    device = devices.describe(jax.local_devices(backend="cpu")[0])
    text = f"{to_yaml(shape)}\n{vocabulary.vocab_size}\n{device}\n{_source()}\n{jax.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source() -> str:
    """A digest of CramJAX's source, which may be newer than its version."""
    digest = hashlib.sha256()
    for path in sorted(Path(devices.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _measure(config: RunConfig, vocabulary: Vocabulary) -> Speed:
    devices.keep_freed_memory()
    keep_programs(config.data.cache_dir)
    began = time.perf_counter()
    program = program_here(config, vocabulary)
    traced = time.perf_counter() - began
    compiled, parts = program.step.compile(), program.parts
    began = time.perf_counter()
    state = jax.block_until_ready(program.create())
    made = time.perf_counter() - began
    tokens, microbatches = program.batch.tokens, program.batch.tokens.shape[0]
    drawn = zipf_tokens(vocabulary.vocab_size, tokens.shape)
    batch = Batch(jax.device_put(drawn, tokens.sharding), jnp.zeros((), jnp.int32))

    def seconds(count: int, least: int, most: float) -> float:
        """Mean time of steps of so many microbatches, which take turns with nothing else."""
        nonlocal state
        times: list[float] = []
        while len(times) < least + 1 or (sum(times[1:]) < most and len(times) < 1000):
            since = time.perf_counter()
            state, metrics = compiled(state, batch._replace(count=np.int32(count)), np.float32(0.5))
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - since)
        return sum(times[1:]) / (len(times) - 1)  # the first one warms up

    one = seconds(1, 3, MEASURE_SECONDS)
    more = seconds(2, 2, MEASURE_SECONDS / 2) if microbatches > 1 else None
    # A step is its microbatches and an update; without accumulation, the two are not told apart.
    each = one if more is None else min(one, max(more - one, 0.0))
    return Speed(
        microbatch_seconds=each,
        update_seconds=one - each,
        microbatch_tokens=parts.microbatch * config.data.sequence_length,
        flops_per_token=parts.flops_per_token,
        peak_flops=devices.peak_flops(jax.local_devices(backend="cpu")[0], parts.model.compute_dtype) or float("inf"),
        start_seconds=traced + made,
        source="steps of this configuration, timed on this CPU",
    )
