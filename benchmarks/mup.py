"""Does a learning rate tuned on a narrow model hold on wider ones: under µP, and in the standard parametrisation?

Every width trains at every rate of a grid (each twice the one before) on the same bytes of the standard library's source,
in the same order, for the same steps; the loss is that of held-out bytes. At the base width both parametrisations are the
same model, trained once. Printed are the losses, and the best rate of each width.

    python benchmarks/mup.py [--quick] [--json PATH] [--plot PATH]
"""

import argparse
import json
import math
import sysconfig
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cramjax.config import BatchConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cramjax.model import make_model, objective_for
from cramjax.scaling.coordinates import widened
from cramjax.train.parts import optimizer_for, resolve_dtype
from cramjax.train.step import Batch, initial_state, make_step
from cramjax.validation import validate

BASE = 64
LENGTH, BATCH = 128, 8
MODEL = ModelConfig(layers=2, width=BASE, heads=2, mlp=4 * BASE, norm="rmsnorm", activation="relu2", init_std=None)
OPTIM = OptimConfig(schedule="wsd", warmup=0.05, decay=0.5, weight_decay=0.1)
PARAMETRISATIONS = {"µP": BASE, "standard": None}


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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="check the script, not the claim")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.widths, args.grid, args.steps = [64, 128], [-9, -7], 5
    held_out = 64
    rows = read((args.steps * BATCH + held_out) * LENGTH).reshape(-1, LENGTH)
    rows = np.random.default_rng(args.seed).permutation(rows)
    train, validation = rows[held_out:].reshape(args.steps, 1, BATCH, LENGTH), rows[:held_out]
    rates = [2.0**e for e in range(args.grid[0], args.grid[1] + 1)]
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in PARAMETRISATIONS}
    started = time.perf_counter()
    for width in args.widths:
        for name, base in PARAMETRISATIONS.items():
            if width == BASE and name != "µP":
                losses[name][width] = losses["µP"][width]
                continue
            run = jax.jit(partial(final_loss, config_of(width, base), seed=args.seed))
            losses[name][width] = [float(run(rate, train, validation)) for rate in rates]
            print(f"{name}, width {width}: {time.perf_counter() - started:.0f} s", flush=True)
    report(losses, rates)
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "losses": losses, "steps": args.steps}, indent=2) + "\n")
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
    dtype = resolve_dtype("auto")
    model = make_model(config.model, vocab_size=256, sequence_length=LENGTH, causal=True, compute_dtype=dtype)  # pyright: ignore
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

    from cramjax.figures import BLUE, GREEN, ORANGE, Plot, styled

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
