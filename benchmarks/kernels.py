"""Each kernel, forward and backward, against its peers on the shapes of `throughput.py`: attention, loss, dense.

Everything runs in one process, in turns, so that all see the same machine; printed are medians and how many times as
fast as each peer CramJAX's function is. Attention: PyTorch's scaled_dot_product_attention and JAX's
dot_product_attention. Cross entropy of a linear head: PyTorch's F.cross_entropy of all logits, and the same in JAX.
Dense: PyTorch's F.linear, and a plain JAX product. The process keeps the memory it frees, which helps all of them;
nothing is charged but the call itself.

    python benchmarks/kernels.py [--quick] [--json PATH] [--shapes NAME ...]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from throughput import SHAPES, Shape, peak

from cramjax.devices import keep_freed_memory
from cramjax.kernels.attention import attention
from cramjax.kernels.cross_entropy import cross_entropy_sum
from cramjax.kernels.dense import dense

Call = Callable[[], Any]


def _jax(function: Callable[..., Any], inputs: list[np.ndarray], cotangent: np.ndarray | None, dtype: str) -> Call:
    """Value and gradients of a JAX function, compiled."""

    def run(*inputs: jax.Array) -> Any:
        *inputs, g = inputs
        y, pullback = jax.vjp(function, *inputs)
        return y, pullback(g.astype(y.dtype))

    compiled = jax.jit(run)
    g = jnp.ones(()) if cotangent is None else jnp.asarray(cotangent, dtype)
    arrays = [*(jnp.asarray(x, dtype) for x in inputs), g]
    return lambda: jax.block_until_ready(compiled(*arrays))


def _torch(function: Callable[..., Any], inputs: list[np.ndarray], cotangent: np.ndarray | None, dtype: str) -> Call:
    """Value and gradients of a PyTorch function."""
    kind = getattr(torch, dtype)
    tensors = [torch.tensor(x, dtype=kind, requires_grad=True) for x in inputs]
    g = None if cotangent is None else torch.tensor(cotangent, dtype=kind)

    def run() -> Any:
        y = function(*tensors)
        return torch.autograd.grad(y, tensors, g)

    return run


def attention_calls(shape: Shape, dtype: str) -> dict[str, Call]:
    """Self-attention as the shape has it, causal or full."""
    rng, causal = np.random.default_rng(0), not shape.masked
    q, k, v, g = (rng.normal(size=(shape.batch, shape.seq, shape.heads, shape.width // shape.heads)) for _ in range(4))

    def sdpa(*qkv: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

    return {
        "cramjax": _jax(lambda *qkv: attention(*qkv, causal=causal), [q, k, v], g, dtype),
        "jax dot_product_attention": _jax(
            lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=causal), [q, k, v], g, dtype
        ),
        "torch": _torch(sdpa, [q, k, v], g, dtype),
    }


def cross_entropy_calls(shape: Shape, dtype: str) -> dict[str, Call]:
    """Mean loss of a linear head on the tokens that a step predicts."""
    rng, count = np.random.default_rng(0), shape.batch * shape.predicted
    x, w = rng.normal(size=(count, shape.width)), rng.normal(size=(shape.width, shape.vocab)) * shape.width**-0.5
    y = rng.integers(0, shape.vocab, count)
    targets, labels = jnp.asarray(y, jnp.int32), torch.from_numpy(y)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1))

    return {
        "cramjax": _jax(lambda x, w: cross_entropy_sum(x, w, targets).total / count, [x, w], None, dtype),
        "jax, all logits": _jax(plain, [x, w], None, dtype),
        "torch": _torch(lambda x, w: F.cross_entropy((x @ w).float(), labels), [x, w], None, dtype),
    }


def dense_calls(shape: Shape, dtype: str) -> dict[str, Call]:
    """The feed-forward layer's first product, with its bias."""
    rng, rows = np.random.default_rng(0), shape.batch * shape.seq
    x, w = rng.normal(size=(rows, shape.width)), rng.normal(size=(shape.width, 4 * shape.width))
    b, g = rng.normal(size=4 * shape.width), rng.normal(size=(rows, 4 * shape.width))
    return {
        "cramjax": _jax(lambda x, w, b: dense(x, w, b, dtype=dtype), [x, w, b], g, dtype),
        "jax": _jax(lambda x, w, b: x @ w + b, [x, w, b], g, dtype),
        "torch": _torch(lambda x, w, b: F.linear(x, w.T, b), [x, w, b], g, dtype),
    }


def flops(kernel: str, shape: Shape) -> float:
    """FLOPs of a kernel's products, forward and backward, as its definition needs them."""
    tokens = shape.batch * shape.seq
    match kernel:
        case "attention":
            pairs = shape.seq if shape.masked else (shape.seq + 1) / 2
            return 12 * tokens * pairs * shape.width
        case "cross entropy":
            return 6 * shape.batch * shape.predicted * shape.width * shape.vocab
        case _:
            return 24 * tokens * shape.width**2


KERNELS = {"attention": attention_calls, "cross entropy": cross_entropy_calls, "dense": dense_calls}


def compare(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each call, in turns of about so many seconds."""
    repeats = {}
    for name, call in calls.items():
        call(), call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Compare, print the tables, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape, three short rounds")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="processor cores used (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rounds, args.seconds = args.shapes[:1], 3, 0.05
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(args.cores)
    peaks = {dtype: peak(dtype) for dtype in ("float32", "bfloat16")}
    print("peak of matrix products: " + ", ".join(f"{d} {1e-9 * p:,.0f} GFLOP/s" for d, p in peaks.items()))
    report: dict[str, Any] = {"peaks": peaks, "kernels": {}}
    for kernel, calls in KERNELS.items():
        for name in args.shapes:
            for dtype, best in peaks.items():
                taken = compare(calls(SHAPES[name], dtype), args.rounds, args.seconds)
                ours = taken["cramjax"]
                share = flops(kernel, SHAPES[name]) / ours / best
                rivals = ", ".join(f"{t / ours:5.2f} x {rival}" for rival, t in taken.items() if rival != "cramjax")
                print(
                    f"  {kernel:13} {name:8} {dtype:8} {1e3 * ours:8.2f} ms  {share:5.1%} of peak  {rivals}", flush=True
                )
                report["kernels"][f"{kernel}/{name}/{dtype}"] = taken
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # Before the first computation: see `keep_freed_memory`.
    keep_freed_memory()
    main()
