"""Training tokens per second on one card: the same architecture, batch and AdamW in CramJAX and in PyTorch, in turns.

For each shape both libraries are processes of their own that stay alive side by side, each with its share of the card's
memory; one computes while the other waits, a turn each, so that both see the same card. CramJAX runs the step that
`cramjax train` runs. PyTorch runs eager, and compiled, and for the smallest shape compiled into CUDA graphs too, with
scaled_dot_product_attention, a fused AdamW and bfloat16 autocast, its residual stream in bfloat16 as CramJAX's is; its
fastest takes part in the turns. Batches lie on the card; nothing is compiled before, or read from a cache. Printed are
median tokens per second, CramJAX's ratio to the fastest PyTorch, the share of the data sheet's dense bfloat16 FLOP/s,
the peak of allocated memory, and the seconds until the first step has ended. On a CPU both compute in float32.

    python benchmarks/gpu.py [--quick] [--json PATH] [--shapes NAME ...]
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.config import RunConfig
from cramjax.errors import UserError
from cramjax.gpus import gpu_of_kind
from cramjax.recipes import load_recipe

JAX_SHARE, TORCH_SHARE = 0.42, 0.50
"""Of the card's memory; the rest is for the two processes' contexts, and what libraries take past their allocators."""
WARM_STEPS = 5
"""After the first; CUDA graphs are recorded in them."""
TIMED_STEPS = 10
BATCHES = 4

_ADAMW = {
    "optim.name": "adamw",
    "optim.lr": 3e-4,
    "optim.embed_lr": None,
    "optim.head_lr": None,
    "optim.scalar_lr": None,
    "optim.weight_decay": 0.1,
    "optim.cautious_decay": False,
    "optim.clip": None,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "batch.ramp": 0.0,
    "train.data_parallel": 1,
}
_TINY = {
    "data.sequence_length": 32,
    "tokenizer.vocab_size": 512,
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.mlp": 128,
}


@dataclass(frozen=True)
class Shape:
    """A recipe with changes, whose step is one microbatch."""

    recipe: str
    batch: int
    """Sequences."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    modes: Sequence[str] = ("eager", "compiled")
    """Of PyTorch."""


SHAPES = {
    "gpt-124m": Shape("gpt-124m", 16),
    "crammed-bert": Shape("crammed-bert", 512),
    "gpt-350m": Shape("gpt-124m", 8, {"model.layers": 24, "model.width": 1024, "model.heads": 16, "model.mlp": 4096}),
    # PyTorch has no adaptive softmax that is as fast, and no skip from the embedding: both do without.
    "gpt-mini": Shape(
        "gpt-mini", 32, {"model.adaptive_head": [], "model.embedding_skip": False}, ("eager", "compiled", "graphs")
    ),
    # As GPT-2 itself has it.
    "gpt2-124m": Shape(
        "gpt-124m",
        16,
        {
            "model.activation": "gelu_tanh",
            "model.norm": "layernorm",
            "model.norm_affine": True,
            "model.bias": True,
            "model.positions": "learned",
            "model.qk_norm": False,
            "model.logit_softcap": None,
        },
    ),
}


def config_of(shape: Shape, quick: bool) -> RunConfig:
    """The run whose step is compared."""
    changes = {**_ADAMW, **shape.changes, **(_TINY if quick else {})}
    batch = 4 if quick else shape.batch
    return load_recipe(shape.recipe, {**changes, "batch.size": batch, "batch.microbatch": batch})


def batches_of(config: RunConfig) -> np.ndarray:
    """Tokens of a few batches (batches, sequences, tokens), by Zipf's law."""
    length = config.data.sequence_length + (config.objective.kind == "causal")
    vocab, shape = config.tokenizer.vocab_size, (BATCHES, config.batch.size, length)
    return np.minimum(np.exp(np.random.default_rng(0).random(shape) * np.log(vocab + 1)) - 1, vocab - 1).astype(int)


Step = Callable[[int], Any]
"""Trains on the batch of a number, and returns the loss, not waited for."""


@dataclass(frozen=True)
class Prepared:
    """A contender that has taken its first steps, or why it has not."""

    device: str = ""
    dtype: str = ""
    start_seconds: float = 0.0
    """Until the first step has ended, without what a later one takes."""
    step_seconds: float = 0.0
    loss: float = 0.0
    """In nats a token, of the last step so far."""
    memory_bytes: int = 0
    """Peak so far: of the card, allocated; of the process on a CPU."""
    failure: str | None = None


def prepare(device: str, dtype: str, step: Step, spent: float, memory: Callable[[], int]) -> Prepared:
    """Take the first steps.

    Args:
        device: its name.
        dtype: precision of products.
        step: waits for nothing.
        spent: seconds of compiling so far.
        memory: the peak, in bytes.
    """
    started = time.perf_counter()
    float(step(0))
    first = time.perf_counter() - started
    for number in range(WARM_STEPS):
        loss = step(number)
    float(loss)
    started = time.perf_counter()
    for number in range(TIMED_STEPS):
        loss = step(number)
    loss = float(loss)
    later = (time.perf_counter() - started) / TIMED_STEPS
    return Prepared(device, dtype, spent + max(0.0, first - later), later, loss, memory())


def serve(pipe: Connection, prepared: Mapping[str, Prepared], steps: Mapping[str, Step]) -> None:
    """Say what has been prepared, then answer each `(mode, steps)` with the seconds they took; None ends it."""
    pipe.send(dict(prepared))
    while (asked := pipe.recv()) is not None:
        mode, count = asked
        started = time.perf_counter()
        for number in range(count):
            loss = steps[mode](number)
        float(loss)
        pipe.send(time.perf_counter() - started)


def cramjax_worker(pipe: Connection, config: RunConfig, modes: Sequence[str]) -> None:
    """A process that trains with CramJAX."""
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(JAX_SHARE)
    import jax

    from cramjax import devices
    from cramjax.planning import fit
    from cramjax.planning.steps import program_here
    from cramjax.recipes import override
    from cramjax.start import start
    from cramjax.training.parts import Vocabulary
    from cramjax.training.step import Batch

    jax.config.update("jax_enable_compilation_cache", False)
    devices.keep_freed_memory()
    (mode,) = modes
    try:
        device = start()[0]
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
        started = time.perf_counter()
        config = fit(override(config, {"train.compute_dtype": dtype}), print)
        program = program_here(config, Vocabulary(config.tokenizer.vocab_size, separator_id=0, mask_id=1))
        compiled = program.step.compile()
        spent = time.perf_counter() - started
        state, like = program.create(), program.batch.tokens
        tokens = batches_of(config).astype(np.int32).reshape(BATCHES, *like.shape)
        batches = [Batch(jax.device_put(rows, like.sharding), np.int32(1)) for rows in tokens]  # pyright: ignore

        def step(number: int) -> Any:
            nonlocal state
            state, metrics = compiled(state, batches[number % BATCHES], np.float32(0.5))
            return metrics.loss

        name = platform.processor() or "CPU" if device.platform == "cpu" else device.device_kind
        ready = prepare(name, dtype, step, spent, lambda: devices.memory_bytes(device))
    except (RuntimeError, UserError) as error:  # out of memory, above all; JAX's own errors are RuntimeErrors
        serve(pipe, {mode: Prepared(failure=_first_line(error))}, {})
    else:
        serve(pipe, {mode: ready}, {mode: step})


def torch_worker(pipe: Connection, config: RunConfig, modes: Sequence[str]) -> None:
    """A process that trains with PyTorch, in each of the modes."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch
    from torch_gpt import Transformer, architecture_of, mask_tokens

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
    name = torch.cuda.get_device_name() if cuda else platform.processor() or "CPU"
    if cuda:
        torch.cuda.set_per_process_memory_fraction(TORCH_SHARE)
        torch.set_float32_matmul_precision("high")
    architecture = architecture_of(config, dtype)
    batches = torch.from_numpy(batches_of(config)).to(device)
    rate = None if architecture.causal else config.objective.mask_rate

    def make(mode: str) -> Step:
        torch.manual_seed(0)
        model = Transformer(architecture).to(device)
        optim = config.optim
        options = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=optim.weight_decay, **options)

        def loss_of(tokens: torch.Tensor) -> torch.Tensor:
            if rate is None:
                return model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
            shown, where, targets = mask_tokens(tokens, rate, 1, architecture.vocab)
            return model(shown, targets, where) / targets.numel()

        loss_function = {
            "eager": lambda: loss_of,
            "compiled": lambda: torch.compile(loss_of),
            "graphs": lambda: torch.compile(loss_of, mode="reduce-overhead"),
        }[mode]()

        def step(number: int) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_function(batches[number % BATCHES])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def memory(others: int) -> int:
        if cuda:
            return torch.cuda.max_memory_allocated() - others
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    prepared, steps = {}, {}
    for mode in modes:
        others = 0
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated()  # by the modes before
        try:
            steps[mode] = make(mode)
            prepared[mode] = prepare(name, dtype, steps[mode], 0.0, lambda others=others: memory(others))
        except RuntimeError as error:  # out of memory is one; so is what the compiler raises
            prepared[mode] = Prepared(failure=_first_line(error))
    serve(pipe, prepared, steps)


class Contender:
    """A process, and the pipe that it answers through."""

    def __init__(self, worker: Callable[..., None], config: RunConfig, modes: Sequence[str]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker, args=(theirs, config, modes))
        self._process.start()
        theirs.close()  # so that the process's death ends the pipe
        self.modes = modes

    def ready(self) -> dict[str, Prepared]:
        """Wait until it has taken its first steps; one that dies has failed in all its modes."""
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            return dict.fromkeys(self.modes, Prepared(failure=self._death()))

    def turn(self, mode: str, steps: int) -> float | str:
        """Seconds of so many steps, or what it died of."""
        try:
            self._pipe.send((mode, steps))
            return self._pipe.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return self._death()

    def end(self) -> None:
        """End the process: kindly, if it waits for its turn."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.terminate()
        self._process.join()

    def _death(self) -> str:
        self._process.join()
        return f"it died with exit code {self._process.exitcode}; what it said is above"


def compare(config: RunConfig, workers: Mapping[str, tuple[Any, Sequence[str]]], rounds: int, seconds: float) -> dict:
    """What each contender came to, by name: `library` where it has one mode, else `library mode`.

    Args:
        config: whose step is compared.
        workers: by library, the process's function and its modes; the fastest mode takes part in the turns.
        rounds: turns of each.
        seconds: length of a turn.
    """
    results: dict[str, dict[str, Any]] = {}
    contenders, playing = {}, {}
    try:
        for library, (worker, modes) in workers.items():
            contenders[library] = Contender(worker, config, modes)
            for mode, prepared in contenders[library].ready().items():
                name = f"{library} {mode}".strip()
                results[name] = vars(prepared) | {"seconds": []}
                if prepared.failure is None:
                    print(f"  {name}: ready after {prepared.start_seconds:.1f} s", flush=True)
                    rival = playing.get(library)
                    if rival is None or prepared.step_seconds < results[rival[0]]["step_seconds"]:
                        playing[library] = name, mode
                else:
                    print(f"  {name}: {prepared.failure}", flush=True)
        for _ in range(rounds):
            for library, (name, mode) in list(playing.items()):
                steps = max(2, round(seconds / results[name]["step_seconds"]))
                taken = contenders[library].turn(mode, steps)
                if isinstance(taken, str):
                    results[name]["failure"] = taken
                    del playing[library]
                else:
                    results[name]["seconds"].append(taken / steps)
    finally:
        for contender in contenders.values():
            contender.end()
    for result in results.values():
        result["step_seconds"] = statistics.median(result["seconds"] or [result["step_seconds"]])
    return results


def report(config: RunConfig, results: dict[str, dict[str, Any]]) -> None:
    """Add what the figures come to, and print them.

    Raises:
        SystemExit: one of the libraries did not find the card.
    """
    from cramjax.training.parts import flops_per_token

    tokens = config.batch.size * config.data.sequence_length
    flops = flops_per_token(config, config.tokenizer.vocab_size)
    alive = {name: result for name, result in results.items() if result["failure"] is None}
    if len({result["dtype"] for result in alive.values()}) > 1:
        found = ", ".join(f"{name} on {result['device']}" for name, result in alive.items())
        raise SystemExit(
            f"error: the libraries compute on different devices: {found}. Install builds of jax and PyTorch that both "
            "find the card (or hide it from both: CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu)."
        )
    best = min((r["step_seconds"] for name, r in alive.items() if name.startswith("PyTorch")), default=None)
    for name, result in results.items():
        if result["failure"] is not None:
            print(f"  {name:17} {result['failure']}")
            continue
        gpu = gpu_of_kind(result["device"])
        rate = result["tokens_per_second"] = tokens / result["step_seconds"]
        result["ratio"] = None if best is None else best / result["step_seconds"]
        result["mfu"] = None if gpu is None else flops * rate / gpu.tensor_flops
        ratio = "-" if result["ratio"] is None else f"{result['ratio']:.2f}"
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
        print(
            f"  {name:17} {rate:11,.0f} tok/s {1e3 * result['step_seconds']:9.2f} ms  {ratio:>5} of the fastest PyTorch"
            f"  MFU {mfu:>5}  {result['memory_bytes'] / 2**30:6.2f} GiB  started in {result['start_seconds']:5.1f} s"
            f"  loss {result['loss']:.2f}",
            flush=True,
        )


def main() -> None:
    """Compare, print the tables, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny models, PyTorch eager only: checks the script; its figures mean nothing",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all but the last, or two with --quick")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 2, 0.2
    started = time.perf_counter()
    versions = {name: version(name) for name in ("jax", "torch", "cramjax")}
    written: dict[str, Any] = {"versions": versions, "shapes": {}}
    for name in args.shapes or list(SHAPES)[: 2 if args.quick else -1]:
        shape = SHAPES[name]
        config = config_of(shape, args.quick)
        print(f"{name}: {config.batch.size} × {config.data.sequence_length}", flush=True)
        modes = shape.modes[:1] if args.quick else shape.modes
        workers = {"PyTorch": (torch_worker, modes), "CramJAX": (cramjax_worker, ("",))}
        results = compare(config, workers, args.rounds, args.seconds)
        report(config, results)
        written["shapes"][name] = {"batch": config.batch.size, "seq": config.data.sequence_length, "results": results}
    written["seconds"] = time.perf_counter() - started
    print(f"It took {written['seconds']:.0f} s.")
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


if __name__ == "__main__":
    main()
