"""A step with its optimizer on the host, part by part, each beside what the machine can do.

The host's update and a plain pass over as much host memory take turns in one process, and so do gradients on their way
down and weights on their way up. Then the first state is made, and some steps are taken in a trace that says what the
host waited for. On a GPU that is gpt-1.3b with sequences of 2048, eight at a time; on a CPU, where device and host are
one and nothing crosses a bus, as few of its layers as show the same parts.

    python benchmarks/offload.py [--quick] [--json PATH]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax import devices
from cramjax.config import RunConfig
from cramjax.parallel.offload import move, pinned
from cramjax.planning.steps import program_here, vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.training.offload import Offloaded
from cramjax.training.offload_state import places_of
from cramjax.training.profile import PHASES, phases_of_a_step
from cramjax.training.step import Batch, State

_HOST = ["--train.offload_optimizer=true", "--train.param_dtype=bfloat16"]


def configured(quick: bool) -> RunConfig:
    """What is trained: on a GPU all of gpt-1.3b, unless it is quick; on a CPU a few of its layers."""
    small = [
        "--model.layers=2",
        "--model.width=512",
        "--model.heads=4",
        "--model.mlp=2048",
        "--tokenizer.vocab_size=8192",
    ]
    if jax.devices()[0].platform == "cpu":
        size = ["--model.layers=2", "--data.sequence_length=128", "--batch.size=1", "--batch.microbatch=1"]
    else:
        size = ["--batch.size=8", "--batch.microbatch=8"]
    return load_recipe("gpt-1.3b", [*size, *(small if quick else []), *_HOST])


def measure(config: RunConfig, rounds: int, steps: int) -> dict[str, Any]:
    """Time each part.

    Args:
        config: what is trained.
        rounds: of each pair that takes turns.
        steps: in the trace.

    Returns:
        Seconds of each part, bytes per second, and ratios.
    """
    devices.keep_freed_memory()
    program = program_here(config, vocabulary_of(config))
    began = time.perf_counter()
    step: Offloaded = program.step.compile()
    compiled = time.perf_counter() - began
    began = time.perf_counter()
    state = jax.block_until_ready(program.create(print))
    created = time.perf_counter() - began
    host = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    found: dict[str, Any] = {
        "device": devices.describe(jax.devices()[0]),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "compile_seconds": compiled,
        "create_seconds": created,
        "create_gb_per_second": host / created / 1e9,
    }
    found |= update_and_copy(step, state, rounds) | down_and_up(step, state, rounds)

    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 1000, program.batch.tokens.shape, np.int32)
    batch = Batch(jax.device_put(tokens, program.batch.tokens.sharding), np.int32(len(tokens)))  # pyright: ignore

    def take(count: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, batch, np.float32(0.5))
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / count

    found["first_step_seconds"] = take(1)
    found["step_seconds"] = take(steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take(steps)
        (trace,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        found["phases"] = phases_of_a_step(trace)
    return found


def update_and_copy(step: Offloaded, state: State, rounds: int) -> dict[str, float]:
    """The update of a block, in turn with `x + 2y` in the place of x over about as many bytes.

    An update reads and writes float32 weights and two moments, reads a gradient and writes new weights.
    """
    layout, name = step.layout, next(iter(step.layout.layer))
    own = jax.tree.map(jnp.copy, (state.optimizer.master[name], state.optimizer.moments[name]))
    like = layout.gradient["blocks"]
    gradient = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), like)
    norm = jax.device_put(np.float32(1.0), state.optimizer.norm.sharding)
    parameters = sum(x.size for x in jax.tree.leaves(own[0]))
    size = parameters * (6 * 4 + 2 * layout.dtype.itemsize)
    x, y = (jnp.ones(size // 12, device=norm.sharding) for _ in range(2))
    add = jax.jit(lambda x, y: x + 2 * y, donate_argnums=0)

    def update() -> Any:
        nonlocal own
        *own, weights = step._programs["blocks"](*own, gradient, np.int32(0), np.float32(0.5), norm)
        return own, weights

    def copy() -> Any:
        nonlocal x
        x = add(x, y)
        return x

    seconds, copied = in_turn(rounds, update, copy)
    return {
        "update_gb_per_second": size / seconds / 1e9,
        "host_gb_per_second": size / copied / 1e9,
        "update_over_host": copied / seconds,
        "update_seconds_of_all": seconds * sum(p.size for p in jax.tree.leaves(state.params)) / parameters,
    }


def down_and_up(step: Offloaded, state: State, rounds: int) -> dict[str, float]:
    """A block's share of gradients from the devices to the CPU backend, in turn with its new weights the other way."""
    layout, name = step.layout, next(iter(step.layout.layer))
    there = jax.tree.map(lambda x: x[0], state.params["blocks"])
    places = places_of(there)
    here = places_of(layout.weights[name])
    weights = jax.block_until_ready(move(there, here))
    size = sum(x.nbytes for x in jax.tree.leaves(there))
    send = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), out_shardings=pinned(places))

    def down() -> Any:
        return move(jax.block_until_ready(send(there)), here)

    def up() -> Any:
        return move(weights, places)

    seconds = in_turn(rounds, down, up)
    return {
        name: size / each / 1e9 for name, each in zip(("down_gb_per_second", "up_gb_per_second"), seconds, strict=True)
    }


def in_turn(rounds: int, *parts: Callable[[], Any]) -> list[float]:
    """Median seconds of each, taking turns; the first two rounds are not counted."""
    seconds: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds + 2):
        for part, own in zip(parts, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(part())
            own.append(time.perf_counter() - began)
    return [statistics.median(own[2:]) for own in seconds]


def described(found: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    phases: Mapping[str, float] = found["phases"]
    whole = sum(phases.values())
    waits = "  ".join(f"{name} {phases[name]:.3g} s ({phases[name] / whole:.0%})" for name in (*PHASES, "other"))
    return "\n".join(
        (
            f"{found['device']}, {found['parameters'] / 1e6:.0f}M parameters; compiled in "
            f"{found['compile_seconds']:.1f} s",
            f"first state  {found['create_seconds']:.2f} s, {found['create_gb_per_second']:.2f} GB/s",
            f"update       {found['update_gb_per_second']:.1f} GB/s, the host's memory "
            f"{found['host_gb_per_second']:.1f}: {found['update_over_host']:.2f} of it; "
            f"{found['update_seconds_of_all']:.3g} s for all parameters",
            f"down, up     {found['down_gb_per_second']:.1f} and {found['up_gb_per_second']:.1f} GB/s",
            f"step         {found['step_seconds']:.3g} s, the first {found['first_step_seconds']:.3g} s; waits of "
            f"{whole:.3g} s: {waits}",
        )
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, and few rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    found = measure(configured(arguments.quick), *((3, 3) if arguments.quick else (9, 8)))
    print(described(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
