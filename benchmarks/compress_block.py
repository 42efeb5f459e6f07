"""A block as wide as a large model's, compressed: seconds and memory by part, measured against what was planned.

The block is drawn at random and is the only one of its model; its inputs are random rows of the residual stream. Memory
is what the process grew by at its peak, over two visits of which the second is timed, beside what a block and three of
its largest Hessian take.

    python benchmarks/compress_block.py [--model llama-7b] [--how w4] [--tokens 4096] [--json PATH] [--quick]
"""

import argparse
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from cramjax.compress.matrix import rewrite
from cramjax.compress.plan import plan_compression
from cramjax.compress.walk import BlockWalk
from cramjax.compression import CompressConfig, resolved
from cramjax.devices import describe
from cramjax.model import Stack, make_model
from cramjax.recipes import load_compression, load_recipe

QUICK = {"width": 256, "heads": 4, "mlp": 704, "layers": 2}


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a recipe, whose block it is")
    parser.add_argument("--how", default="w4", help="as `cramjax compress` takes it")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="check the script, not the claim: a small block")
    args = parser.parse_args()
    length = 128 if args.quick else args.length
    sequences = max(1, (512 if args.quick else args.tokens) // length)
    config = resolved(load_compression(args.how, {"data": "text", "sequences": sequences, "sequence_length": length}))
    overrides = {f"model.{name}": value for name, value in QUICK.items()} if args.quick else {}
    recipe = load_recipe(args.model, overrides)
    planned = plan_compression(args.model, config) if not args.quick else None
    stack = make_model(
        replace(recipe.model, layers=1),
        vocab_size=256,
        sequence_length=length,
        causal=True,
        compute_dtype="float32",
        param_dtype="float32",
    )
    print(f"{describe(jax.local_devices()[0])}: a block of {args.model}, {args.how}, {sequences} × {length} tokens")
    found = measured(stack, config, sequences, length)
    peak, block, hessian = found["peak_bytes"], found["block_bytes"], found["largest_hessian_bytes"]
    limit = block + 3 * hessian
    for name, seconds in found["seconds"].items():
        print(f"{name:12} {seconds:8.1f} s" + ("" if planned is None else f", planned {planned.seconds[name]:.1f} s"))
    whole = sum(found["seconds"].values())
    print(f"{'all':12} {whole:8.1f} s", end="")
    print("" if planned is None else f", planned {sum(planned.seconds.values()):.1f} s")
    said = "" if planned is None else f", planned {sum(planned.device_bytes.values()) / 2**20:.0f}"
    print(f"memory above the start: {peak / 2**20:.0f} MiB{said}; block + 3 Hessians {limit / 2**20:.0f} MiB")
    for name, error in found["errors"].items():
        print(f"error of {name}: {error:.3%}")
    if args.json:
        found["planned"] = None if planned is None else planned.json()
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(stack: Stack, config: CompressConfig, sequences: int, length: int) -> dict[str, Any]:
    """One block's walk, timed by part, with the process's memory watched."""
    walk, rng = BlockWalk(stack, jax.local_devices()[0], config.sequential, config.only), np.random.default_rng(0)
    shapes = stack.abstract_params()
    embedding = {"embed": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["embed"])}
    calibration = walk.begin(embedding, np.zeros((sequences, length), np.int32), batch=max(1, 2048 // length))
    streams = [rng.standard_normal(x.shape).astype(x.dtype) for x in calibration.streams]
    calibration = calibration.after(streams)
    started = psutil.Process().memory_info().rss
    block = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape[1:], np.float32) * 0.02, shapes["blocks"])
    spent = {"solving": 0.0}
    errors, sizes = {}, []

    def visit(name: str, w: Any, hessian: Any) -> tuple[Any, Any]:
        sizes.append(hessian.nbytes)
        jax.block_until_ready(hessian)
        began = time.perf_counter()
        made = rewrite(w, hessian, config)
        errors[name] = made.error
        jax.block_until_ready(made.weights)
        spent["solving"] += time.perf_counter() - began
        return jax.tree.map(np.asarray, made.leaf), made.weights

    with Peak() as peak:
        walk.visit(block, 0, calibration, visit)  # and compile
        spent["solving"] = 0.0
        with TimedHessians() as summed:
            began = time.perf_counter()
            walk.visit(block, 0, calibration, visit)
            whole = time.perf_counter() - began
    seconds = {"forward": whole - spent["solving"] - summed.seconds, "Hessians": summed.seconds, **spent}
    return {
        "seconds": seconds,
        "peak_bytes": peak.bytes - started,
        "block_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(block)),
        "largest_hessian_bytes": max(sizes),
        "errors": errors,
        "tokens": sequences * length,
    }


class Peak:
    """The largest resident memory of this process while it is entered, looked at a hundred times a second."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, process.memory_info().rss)


class TimedHessians:
    """Counts the seconds of sums of outer products, each waited for."""

    def __enter__(self) -> "TimedHessians":
        from cramjax.compress import hessian

        self.seconds, self._added = 0.0, hessian.added

        def added(sums: Any, found: Any) -> Any:
            jax.block_until_ready(found)
            began = time.perf_counter()
            made = jax.block_until_ready(self._added(sums, found))
            self.seconds += time.perf_counter() - began
            return made

        hessian.added = added
        return self

    def __exit__(self, *_: object) -> None:
        from cramjax.compress import hessian

        hessian.added = self._added


if __name__ == "__main__":
    main()
