"""Does a learning rate tuned on a narrow model hold on wider ones: under µP, and in the standard parametrisation?

Every width trains at every rate of a grid (each twice the one before) on the same bytes of the standard library's
source, in the same order, for the same steps; the loss is that of held-out bytes. At the base width both
parametrisations are the same model, trained once. Printed are the losses, and the best rate of each width.

    python benchmarks/mup.py [--quick] [--json PATH] [--plot PATH]
"""

import argparse
import json
import math
import os
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cramjax.config import BatchConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cramjax.model import make_model, objective_for
from cramjax.scaling.coordinates import widened
from cramjax.training.parts import optimizer_for
from cramjax.training.step import Batch, initial_state, make_step
from cramjax.validation import validate

BASE = 64
LENGTH, BATCH, HELD_OUT = 64, 4, 64
MODEL = ModelConfig(layers=2, width=BASE, heads=2, mlp=4 * BASE, norm="rmsnorm", activation="relu2", init_std=None)
OPTIM = OptimConfig(schedule="wsd", warmup=0.05, decay=0.5, weight_decay=0.1)
PARAMETRISATIONS = {"µP": BASE, "standard": None}


def sweep(name: str, width: int, rates: list[float], steps: int, seed: int) -> list[float]:
    """The loss of a width at every rate."""
    rows = read((steps * BATCH + HELD_OUT) * LENGTH).reshape(-1, LENGTH)
    rows = np.random.default_rng(seed).permutation(rows)
    train, validation = rows[HELD_OUT:].reshape(steps, 1, BATCH, LENGTH), rows[:HELD_OUT]
    run = jax.jit(partial(final_loss, config_of(width, PARAMETRISATIONS[name]), seed=seed))
    return [float(run(rate, train, validation)) for rate in rates]


def read(tokens: int) -> np.ndarray:
    """So many bytes of the standard library's modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    assert len(text) >= tokens, f"the standard library has {len(text)} bytes, not {tokens}"
    return np.frombuffer(text[:tokens], np.uint8).astype(np.int32)


def main() -> None:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--grid", type=int, nargs=2, default=[-11, -5], help="exponents of 2: first and last rate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="check the script, not the claim")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.widths, args.grid, args.steps = [64, 128], [-9, -7], 5
    rates = [2.0**e for e in range(args.grid[0], args.grid[1] + 1)]
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in PARAMETRISATIONS}
    tasks = [(name, width) for width in args.widths for name in PARAMETRISATIONS if (name, width) != ("standard", BASE)]
    # Models this small are fastest on one core each.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    started = time.perf_counter()
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        waiting = {pool.submit(sweep, *task, rates, args.steps, args.seed): task for task in reversed(tasks)}
        for done in as_completed(waiting):
            name, width = waiting[done]
            losses[name][width] = done.result()
            print(f"{name}, width {width}: {done.result()}, after {time.perf_counter() - started:.0f} s", flush=True)
    if BASE in args.widths:
        losses["standard"][BASE] = losses["µP"][BASE]
    losses = {name: dict(sorted(by_width.items())) for name, by_width in losses.items()}
    report(losses, rates)
    if args.json:
        args.json.write_text(
            json.dumps({"rates": rates, "losses": losses, "steps": args.steps}, indent=2) + "\n", encoding="utf-8"
        )
    if args.plot:
        plot(losses, rates, args.plot)


def config_of(width: int, base: int | None) -> RunConfig:
    """The run at a width."""
    model = replace(widened(MODEL, width), mup_base_width=base)
    data, batch = DataConfig(sequence_length=LENGTH), BatchConfig(size=BATCH)
    config = RunConfig(model=model, data=data, batch=batch, optim=OPTIM, train=TrainConfig())
    validate(config)
    return config


def final_loss(config: RunConfig, rate: Array, train: Array, validation: Array, *, seed: int) -> Array:
    """Loss of held-out rows, in nats per byte, after training at a (traced) peak rate."""
    config = replace(config, optim=replace(config.optim, lr=rate))  # pyright: ignore[reportArgumentType]
    model = make_model(config.model, vocab_size=256, sequence_length=LENGTH, causal=True)
    objective = objective_for(config.objective, model)
    optimizer = optimizer_for(config, model)
    step = make_step(objective, optimizer)
    steps = len(train)

    def one(state, item):
        tokens, index = item
        return step(state, Batch(tokens, jnp.ones((), jnp.int32)), (index + 1) / steps)[0], None

    state = initial_state(model.init(jax.random.key(seed)), optimizer, seed)
    state, _ = jax.lax.scan(one, state, (train, jnp.arange(steps)))
    loss = objective(state.params, validation, None, 1.0, False)
    return loss.nll / loss.tokens


def report(losses: dict[str, dict[int, list[float]]], rates: list[float]) -> None:
    """Print losses by width and rate, the best marked, and how far the best rate moves."""
    for name, by_width in losses.items():
        print(f"\n{name}: held-out loss, nats per byte\n{'width':>6}" + "".join(f"{rate:>10.2g}" for rate in rates))
        best = {}
        for width, row in by_width.items():
            best[width] = int(np.nanargmin(row))
            cells = [f"{loss:9.4f}{'*' if i == best[width] else ' '}" for i, loss in enumerate(row)]
            print(f"{width:>6}" + "".join(cells))
        first, *others = best.values()
        moves = ", ".join(f"{width}: {i - first:+d}" for width, i in zip(list(best)[1:], others, strict=True))
        at_tuned = ", ".join(f"{width}: {row[first] - row[best[width]]:+.4f}" for width, row in by_width.items())
        print(f"best rate against width {next(iter(best))}, in steps of 2: {moves}")
        print(f"loss lost by keeping that width's rate: {at_tuned}")


def plot(losses: dict[str, dict[int, list[float]]], rates: list[float], path: Path) -> None:
    """Loss by rate, a panel for each parametrisation and a line for each width."""
    from matplotlib.figure import Figure

    from cramjax.show.figures import BLUE, GREEN, ORANGE, Plot, styled

    with styled():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, (name, by_width) in zip(figure.subplots(1, 2, sharey=True), losses.items(), strict=True):
            for (width, row), colour in zip(by_width.items(), (BLUE, ORANGE, GREEN), strict=False):
                axes.plot(rates, row, "o-", color=colour, markersize=3, label=f"width {width}")
            axes.set_xscale("log", base=2)
            axes.set_title(name)
            axes.set_xlabel("peak learning rate")
            axes.legend()
    finite = [loss for by_width in losses.values() for row in by_width.values() for loss in row if math.isfinite(loss)]
    figure.axes[0].set_ylim(min(finite) - 0.05, min(finite) + 1)
    figure.axes[0].set_ylabel("loss, nats per byte")
    Plot(figure).save(path)


if __name__ == "__main__":
    main()
