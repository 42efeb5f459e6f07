"""Training tokens per second: the same model, batch and optimizer in PyTorch and in CramJAX, interleaved in one run.

Each contender is a process of its own that compiles, warms up, and then steps only when told to; the contenders take
turns, so that all of them see the same machine. PyTorch runs eager and compiled, in float32 and under bfloat16
autocast, with scaled_dot_product_attention and a fused AdamW; CramJAX in both precisions. All processes keep the memory
they free (see `cramjax.devices.keep_freed_memory`), which helps PyTorch too. Printed for each shape are the median
tokens per second, each CramJAX variant's ratio to the fastest PyTorch one, the share of the measured peak of
matrix products in its precision, and the peak of resident memory.

    python benchmarks/throughput.py [--quick] [--json PATH] [--shapes NAME ...]
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A GPT-2 style decoder, or a BERT style encoder that predicts a quarter of its tokens; 64 or 32 wide heads."""

    layers: int
    width: int
    heads: int
    seq: int
    batch: int
    vocab: int
    masked: bool = False

    @property
    def predicted(self) -> int:
        """Tokens of a sequence that the head reads."""
        return self.seq // 4 if self.masked else self.seq


SHAPES = {
    "nanogpt": Shape(4, 128, 4, 64, 12, 256),
    "bytes": Shape(6, 384, 6, 256, 8, 256),
    "gpt": Shape(6, 512, 8, 256, 8, 8192),
    "encoder": Shape(4, 256, 4, 128, 32, 8192, masked=True),
}
VARIANTS = [
    "torch-eager-float32",
    "torch-eager-bfloat16",
    "torch-compiled-float32",
    "torch-compiled-bfloat16",
    "cramjax-float32",
    "cramjax-bfloat16",
]
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
START_SECONDS, TURN_SECONDS = 600.0, 120.0
"""What a contender may take to compile and warm up, and to answer afterwards."""
Step = Callable[[np.ndarray], Any]


def torch_step(shape: Shape, compiled: bool, dtype: str) -> tuple[Step, Callable[[Any], float]]:
    """A training step of the shape in PyTorch."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = shape.width
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            batch, seq, width = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, shape.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not shape.masked)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(shape.vocab, shape.width)
            self.positions = nn.Embedding(shape.seq, shape.width)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(shape.width)
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.blocks(self.tokens(tokens[:, : shape.seq]) + self.positions.weight))
            if shape.masked:
                where = torch.rand(tokens.shape).argsort(1)[:, : shape.predicted]
                x = x.gather(1, where[:, :, None].expand(-1, -1, shape.width))
                targets = tokens.gather(1, where)
            else:
                targets = tokens[:, 1:]
            return F.cross_entropy((x @ self.tokens.weight.T).float().flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(tokens: np.ndarray) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(torch.from_numpy(tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, float


def cramjax_step(shape: Shape, dtype: str) -> tuple[Step, Callable[[Any], float]]:
    """A training step of the shape in CramJAX: the one that `cramjax train` runs."""
    import jax
    import jax.numpy as jnp

    from cramjax.config import ObjectiveConfig, OptimConfig
    from cramjax.model import make_model, objective_for
    from cramjax.optim import make_optimizer
    from cramjax.start import start
    from cramjax.training.step import Batch, initial_state, make_step

    start()
    model = make_model(
        _model_config(shape),
        vocab_size=shape.vocab,
        sequence_length=shape.seq,
        causal=not shape.masked,
        compute_dtype=dtype,  # pyright: ignore[reportArgumentType]
    )
    objective = ObjectiveConfig(kind="masked" if shape.masked else "causal", mask_rate=0.25)
    optim = OptimConfig(
        name="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=0.999, clip=None, schedule="constant"
    )
    optimizer = make_optimizer(optim, model.weights)
    loss = objective_for(objective, model, mask_id=0)
    step = jax.jit(make_step(loss, optimizer), donate_argnums=0)
    state = initial_state(model.init(jax.random.key(0)), optimizer, 0)

    def run(tokens: np.ndarray) -> Any:
        nonlocal state
        state, metrics = step(state, Batch(jnp.asarray(tokens[None], jnp.int32), jnp.int32(1)), np.float32(0.5))
        return metrics.loss

    return run, float


def flops_per_token(shape: Shape) -> float:
    """Model FLOPs of a training token, forward and backward."""
    from cramjax.model import train_flops_per_token

    return train_flops_per_token(
        _model_config(shape),
        vocab_size=shape.vocab,
        sequence_length=shape.seq,
        causal=not shape.masked,
        mask_rate=0.25 if shape.masked else None,
    )


def _model_config(shape: Shape) -> Any:
    from cramjax.config import ModelConfig

    return ModelConfig(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        mlp=4 * shape.width,
        activation="gelu_tanh",
        norm="layernorm",
        norm_affine=True,
        bias=True,
        positions="learned",
        tied=True,
    )


def worker(variant: str, shape: Shape, cores: int, pipe: Connection) -> None:
    """Compile, warm up, then answer each number of steps with the seconds they took; None ends it.

    What warms up is five steps, or fewer where they take longer than five seconds.
    """
    from cramjax.devices import keep_freed_memory

    keep_freed_memory()
    library, *mode, dtype = variant.split("-")
    if library == "torch":
        import torch

        torch.set_num_threads(cores)
        step, wait = torch_step(shape, mode[0] == "compiled", dtype)
    else:
        step, wait = cramjax_step(shape, dtype)
    text = np.random.default_rng(0)
    batches = [
        text.integers(0, shape.vocab, (shape.batch, shape.seq + (not shape.masked))).astype(np.int64) for _ in range(8)
    ]
    loss, began = wait(step(batches[0])), time.perf_counter()
    for number in range(1, 5):
        if time.perf_counter() - began > 5.0:
            break
        loss = wait(step(batches[number]))
    pipe.send(loss)
    while (steps := pipe.recv()) is not None:
        start = time.perf_counter()
        for number in range(steps):
            last = step(batches[number % 8])
        wait(last)
        pipe.send((time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def peak(dtype: str) -> float:
    """Measured FLOP/s of square matrix products in a precision: the better of the two libraries."""
    import jax
    import jax.numpy as jnp
    import torch

    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))

    def in_jax(size: int) -> Callable[[], Any]:
        a = jnp.ones((size, size), dtype)
        return lambda: product(a).block_until_ready()

    def in_torch(size: int) -> Callable[[], Any]:
        b = torch.ones((size, size), dtype=getattr(torch, dtype))
        return lambda: b @ b

    return max(best_rate(in_jax), best_rate(in_torch))


def best_rate(product_of: Callable[[int], Callable[[], Any]], seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of growing square products, within about so many seconds.

    Matrices double in size up to 2048 as long as two products of the next, of eight times the work, fit the time: a
    library that is slow in a precision is known to be after small ones.

    Args:
        product_of: makes a product of matrices of a size, to be called again and again.
        seconds: what all of it may take, but for compiling.
    """
    best = spent = 0.0
    for size in (128, 256, 512, 1024, 2048):
        run, fastest = product_of(size), float("inf")
        run()  # compiles, and touches memory
        for _ in range(8):
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            spent, fastest = spent + taken, min(fastest, taken)
            if spent > seconds:
                break
        best = max(best, 2 * size**3 / fastest)
        if spent + 2 * 8 * fastest > seconds:
            break
    return best


def compare(shape: Shape, variants: list[str], rounds: int, seconds: float, cores: int) -> dict[str, dict[str, float]]:
    """Tokens per second of every variant, in turns of about so many seconds."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, steps = {}, {}, {}

    def give_up(variant: str, why: str) -> NoReturn:
        for process in processes.values():
            process.kill()
            process.join()
        raise SystemExit(f"{variant} {why}")

    def receive(variant: str, patience: float = TURN_SECONDS + 10 * seconds) -> Any:
        if not pipes[variant].poll(patience):
            give_up(variant, f"did not answer within {patience:g} s: leave it out, with --variants.")
        try:
            return pipes[variant].recv()
        except (EOFError, ConnectionResetError):
            processes[variant].join()
            give_up(variant, f"died with exit code {processes[variant].exitcode}; what it said is above.")

    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        processes[variant] = context.Process(target=worker, args=(variant, shape, cores, theirs))
        processes[variant].start()
        theirs.close()  # so that a contender's death ends its pipe
        loss = receive(variant, START_SECONDS)
        pipes[variant].send(1)
        steps[variant] = max(1, round(seconds / receive(variant)[0]))
        print(f"  {variant}: ready, loss {loss:.3f} after its first steps", flush=True)
    rates: dict[str, list[float]] = {variant: [] for variant in variants}
    memory = {}
    for _ in range(rounds):
        for variant in variants:
            time.sleep(0.3)  # idle threads of the one before stop spinning
            pipes[variant].send(steps[variant])
            taken, memory[variant] = receive(variant)
            rates[variant].append(steps[variant] * shape.batch * shape.seq / taken)
    for variant in variants:
        pipes[variant].send(None)
        processes[variant].join()
    return {v: {"tokens_per_second": statistics.median(rates[v]), "memory_bytes": memory[v]} for v in variants}


def main() -> None:
    """Compare, print the tables, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape, three short rounds")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a turn (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="processor cores used (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rounds, args.seconds = args.shapes[:1], 3, 0.5
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    peaks = {dtype: peak(dtype) for dtype in ("float32", "bfloat16")}
    print("peak of matrix products: " + ", ".join(f"{d} {1e-9 * p:,.0f} GFLOP/s" for d, p in peaks.items()))
    report: dict[str, Any] = {"peaks": peaks, "shapes": {}}
    for name in args.shapes:
        shape = SHAPES[name]
        print(f"{name}: {shape}", flush=True)
        figures = compare(shape, args.variants, args.rounds, args.seconds, args.cores)
        rivals = [f["tokens_per_second"] for v, f in figures.items() if v.startswith("torch")]
        for variant, f in figures.items():
            f["ratio"] = f["tokens_per_second"] / max(rivals) if rivals else float("nan")
            f["share_of_peak"] = f["tokens_per_second"] * flops_per_token(shape) / peaks[variant.rsplit("-", 1)[1]]
            print(
                f"  {variant:24} {f['tokens_per_second']:9,.0f} tok/s  {f['ratio']:5.2f} of the fastest PyTorch"
                f"  {f['share_of_peak']:5.1%} of peak  {f['memory_bytes'] / 2**20:6,.0f} MiB",
                flush=True,
            )
        report["shapes"][name] = {**asdict(shape), "variants": figures}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
