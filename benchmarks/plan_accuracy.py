"""The planner's bytes against the compiler's: models × policies × cards, each step compiled ahead of time.

Every case takes the largest microbatch that the planner says fits its card (the smallest where none fits). Needs the
extra `aot`; 72 programs of about 15 seconds each on one core. Results are kept in a file, so that an interrupted run
goes on where it stopped; `--table` prints them in Markdown.

    python benchmarks/plan_accuracy.py results.jsonl
    python benchmarks/plan_accuracy.py results.jsonl --table
    python benchmarks/plan_accuracy.py results.jsonl --microbatches    # crammed BERT against the published ones
    python benchmarks/plan_accuracy.py results.jsonl --cpu             # gpt-mini on the CPU there is
    python benchmarks/plan_accuracy.py results.jsonl --cpu --tune MODEL  # tune-chat and the like of a model there
"""

import argparse
import ctypes
import gc
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cramjax.config import RunConfig
from cramjax.planning import compile_here, compile_step, estimate_memory
from cramjax.planning.place import device_named
from cramjax.planning.plan import compute_dtype_of, largest_microbatch, under
from cramjax.planning.steps import program_here, vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.training.continuing import continued
from cramjax.training.step import Batch

MODELS = ("crammed-bert", "gpt-124m", "gpt-1.3b")
POLICIES = ("none", "selective", "full", "offload", "adalomo", "full+offload_optimizer")
CARDS = ("rtx-2080-ti", "rtx-4090", "a6000", "h100")
PUBLISHED = {"rtx-2080-ti": (96, 8160), "a4000": (128, 8192), "a6000": (512, 8192)}
"""Crammed BERT's microbatch by its authors, and the batch that it divides."""


def case(model: str, policy: str, card: str) -> RunConfig:
    """The configuration of a case, with the microbatch that the planner chooses."""
    config = load_recipe(model, ["--optim.name=adamw"])
    device = device_named(card)
    if policy != "adalomo":
        return largest_microbatch(under(config, policy), vocabulary_of(config), device)[0]
    train = replace(config.train, param_dtype="bfloat16", remat="full")
    config = replace(config, train=train, optim=replace(config.optim, name="adalomo"))
    chosen = None
    for size in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1):  # which is the batch: nothing is accumulated
        batch = replace(config.batch, size=size, microbatch=None, ramp=0.0)
        chosen, _, fits = largest_microbatch(replace(config, batch=batch), vocabulary_of(config), device)
        if fits:
            break
    assert chosen is not None
    return chosen


def measure(model: str, policy: str, card: str) -> dict[str, Any]:
    """Estimated and compiled bytes of one case."""
    config, device = case(model, policy, card), device_named(card)
    vocab_size, dtype = vocabulary_of(config).vocab_size, compute_dtype_of(config, device)
    estimate = estimate_memory(config, vocab_size=vocab_size, compute_dtype=dtype, gpu=device.gpu)
    compiled = compile_step(config, card)
    return {
        "model": model,
        "policy": policy,
        "card": card,
        "microbatch": config.batch.microbatch,
        "fits": compiled.device_bytes <= device.usable,
        "estimate": estimate.device_bytes,
        "exact": compiled.device_bytes,
        "host_estimate": estimate.host_bytes,
        "host_exact": compiled.host,
        "by_kind": dict(estimate.by_kind),
        "jax": jax.__version__,
    }


def table(results: list[dict[str, Any]]) -> None:
    """Print results in Markdown: microbatch, estimated and compiled GiB, and how near they are."""
    names = [device_named(card).name.removeprefix("NVIDIA ").removeprefix("GeForce ") for card in CARDS]
    print("| recipe | policy | " + " | ".join(names) + " |\n| --- | --- |" + " --- |" * len(CARDS))
    found = {(r["model"], r["policy"], r["card"]): r for r in results}
    for model in MODELS:
        for policy in POLICIES:
            cells = [_cell(found.get((model, policy, card))) for card in CARDS]
            print(f"| {model} | {policy.removeprefix('full+')} | " + " | ".join(cells) + " |")
    off = [r["estimate"] / r["exact"] - 1 for r in results]
    worst = max(results, key=lambda r: abs(r["estimate"] / r["exact"] - 1))
    larger = [r for r in results if not r["fits"] and r["estimate"] <= device_named(r["card"]).usable]
    versions = ", ".join(sorted({r["jax"] for r in results}))
    near, nearer = (sum(abs(x) <= limit for x in off) for limit in (0.1, 0.05))
    print(
        f"\nMicrobatch: planned / compiled GiB, with jax {versions}. * More than the card has. `adalomo` and "
        f"`offload_optimizer` are with `remat=full`. Of {len(off)} estimates, {nearer} are within 5% of the compiler's "
        f"bytes and {near} within 10%; the worst is {worst['estimate'] / worst['exact'] - 1:+.1%} ({worst['model']}, "
        f"{worst['policy']}, {worst['card']}). Of those that were to fit, {len(larger)} do not."
    )


def _cell(r: dict[str, Any] | None) -> str:
    if r is None:
        return ""
    return f"{r['microbatch']}: {r['estimate'] / 2**30:.1f} / {r['exact'] / 2**30:.1f}{'' if r['fits'] else ' *'}"


def microbatches() -> None:
    """Crammed BERT's largest microbatch by the compiler on the authors' cards, without rematerialisation."""
    for card, (published, size) in PUBLISHED.items():
        device, best = device_named(card), None
        config = load_recipe("crammed-bert", [f"--batch.size={size}", f"--batch.microbatch={published}"])
        for microbatch in (n for n in range(published, size // 2 + 1) if size % n == 0):
            candidate = replace(config, batch=replace(config.batch, microbatch=microbatch))
            exact = compile_step(candidate, card).device_bytes
            if exact > device.usable:
                print(f"  {microbatch} would take {exact / 2**30:.2f} GiB")
                break
            best = microbatch, exact
        text = "none" if best is None else f"{best[0]} ({best[1] / 2**30:.2f} of {device.usable / 2**30:.2f} GiB)"
        print(f"{card}: published {published}, largest that divides {size}: {text}")


def cpu(tuned: Path | None) -> None:
    """The estimate against the CPU's own program, and against what the process allocates to run it.

    Args:
        tuned: a model directory, which a LoRA and a QLoRA are trained of; None: gpt-mini is trained.
    """
    if tuned is None:
        cases = {"gpt-mini": load_recipe("gpt-mini")}
    else:
        given = {"model.from": str(tuned), "batch.size": 8, "batch.microbatch": 8}
        bases = {"lora": {}, "qlora": {"adapter.base": "nf4"}}
        cases = {name: continued(load_recipe("tune-chat", given | more)) for name, more in bases.items()}
    for name, policy in itertools.product(cases, ("none", "selective", "full")):
        config, device = under(cases[name], policy), device_named("cpu")
        dtype, vocabulary = compute_dtype_of(config, device), vocabulary_of(config)
        config = replace(config, train=replace(config.train, compute_dtype=dtype))  # for the other process, too
        estimate = estimate_memory(config, vocab_size=vocabulary.vocab_size, compute_dtype=dtype, gpu=None).device_bytes
        exact = compile_here(config).device_bytes
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            allocated = pool.submit(resident, config).result()
        text = f"{name} {policy} {dtype}: estimate {estimate / 2**20:.1f} MiB"
        for name, value in (("compiler", exact), ("allocated", allocated)):
            text += f", {name} {value / 2**20:.1f} ({estimate / value - 1:+.1%})"
        print(text, flush=True)


def resident(config: RunConfig) -> int:
    """Bytes of a run's state, and by how much this process grows beyond it at the peak of three steps."""
    program = program_here(config, vocabulary_of(config))
    compiled, tokens = program.step.compile(), program.batch.tokens
    batch = Batch(jax.device_put(np.ones(tokens.shape, np.int32), tokens.sharding), np.int32(tokens.shape[0]))
    state = jax.block_until_ready(program.create())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is from here on
    for _ in range(3):
        state, metrics = compiled(state, batch, np.float32(0.5))
        jax.block_until_ready(metrics)
    return sum(x.nbytes for x in jax.tree.leaves(state)) + _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--cards", nargs="+", default=CARDS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--microbatches", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tune", type=Path, default=None, help="A model directory: with --cpu, tune-chat of it.")
    arguments = parser.parse_args()
    results = []
    if arguments.results.exists():
        results = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    if arguments.table:
        return table(results)
    if arguments.microbatches:
        return microbatches()
    if arguments.cpu:
        return cpu(arguments.tune)
    done = {(r["model"], r["policy"], r["card"]) for r in results}
    for card in arguments.cards:
        for model in arguments.models:
            for policy in arguments.policies:
                if (model, policy, card) in done:
                    continue
                result = measure(model, policy, card)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(
                    f"{model} {policy} {card} × {result['microbatch']}: {result['estimate'] / 2**30:.2f} / "
                    f"{result['exact'] / 2**30:.2f} GiB ({result['estimate'] / result['exact'] - 1:+.1%}), host "
                    f"{result['host_estimate'] / 2**30:.2f} / {result['host_exact'] / 2**30:.2f}",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
