"""What a token's products and its choice cost alone: the kernel for a few rows in each form of weights against BLAS's
reading of memory, and the largest of a vocabulary by groups against `jax.lax.top_k`.

All take turns in one process; the fastest of the rounds counts, as for anything that only other work can slow down.

    python benchmarks/few_rows.py [--quick] [--json PATH]
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import bandwidth

from cramjax.kernels.dense.few_rows import few_rows, refusal
from cramjax.kernels.largest import largest
from cramjax.kernels.packed import quantise

ROWS = (1, 3, 8)
VOCAB = 49152


def products(layers: int, inner: int, outer: int, rows: int) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """A stack's products in each form, and the bytes that each reads."""
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=(layers, inner, outer)).astype(np.float32))
    x = jnp.asarray(draw.normal(size=(rows, inner)).astype(np.float32))
    eight, four = quantise(w, 8), quantise(w, 4)
    forms = {
        "float32": (w, None, False),
        "bfloat16": (w.astype(jnp.bfloat16), None, False),
        "int8": (eight.q, eight.scale, False),
        "w8a8": (eight.q, eight.scale, True),
        "int4": (four.q, four.scale, False),
        "w4a8": (four.q, four.scale, True),
    }

    @functools.partial(jax.jit, static_argnames="rounds")
    def multiply(x: jax.Array, w: jax.Array, scale: jax.Array | None, rounds: bool) -> jax.Array:
        return jax.lax.map(lambda layer: few_rows(x, w, layer, scale=scale, rounds=rounds), jnp.arange(layers))

    calls = {name: functools.partial(multiply, x, w, scale, rounds) for name, (w, scale, rounds) in forms.items()}
    sizes = {name: w.nbytes + (0 if scale is None else scale.nbytes) for name, (w, scale, _) in forms.items()}
    return calls, sizes


def choices(rows: int, count: int) -> dict[str, Callable[[], Any]]:
    """The largest numbers of a vocabulary, in two ways."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, VOCAB)).astype(np.float32))
    ways: dict[str, Callable[..., Any]] = {"by groups": largest, "lax.top_k": jax.lax.top_k}
    return {name: functools.partial(jax.jit(way, static_argnums=1), x, count) for name, way in ways.items()}


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the least of some rounds in which they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for attempt in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if attempt:  # the first one compiles
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small matrices, three rounds.")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if reason := refusal():
        raise SystemExit(f"The kernel cannot run here: {reason}.")
    rounds, shape = (3, (2, 256, 512)) if args.quick else (60, (8, 1024, 4096))
    speed = bandwidth()
    print(f"memory is read at {speed / 1e9:.1f} GB/s")
    result: dict[str, Any] = {"bandwidth": speed, "products": {}, "choices": {}}
    for rows in ROWS:
        calls, sizes = products(*shape, rows)
        seconds = fastest(calls, rounds)
        result["products"][rows] = seconds
        for name, each in seconds.items():
            share = sizes[name] / each / speed
            print(f"{rows} rows  {name:9} {each * 1e3:7.2f} ms  {share:5.0%} of the bandwidth")
    for rows in (1, 8):
        for count in (20, 64):
            seconds = fastest(choices(rows, count), rounds)
            result["choices"][f"{rows} rows, {count}"] = seconds
            ratio = seconds["lax.top_k"] / seconds["by groups"]
            print(f"{rows} rows  {count} largest of {VOCAB}: {ratio:.2f} times as fast by groups as by lax.top_k")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
