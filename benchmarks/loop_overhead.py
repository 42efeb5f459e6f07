"""What the training loop costs over a bare jitted step: both in one process, in turn, on the same compiled step.

Prints the median time of a step in the loop (data, dispatch, metrics, logging), that of the bare step on a batch
already
on the device, and their ratio.

    python benchmarks/loop_overhead.py [--quick] [--json PATH]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from cramjax import devices
from cramjax.budget import Budget
from cramjax.recipes import load_recipe
from cramjax.training.display import QuietDisplay
from cramjax.training.loop import spend_budget
from cramjax.training.opening import open_run
from cramjax.training.session import Session
from cramjax.training.signals import Signals


def measure(recipe: str, blocks: int, steps: int) -> dict[str, float | str]:
    """Time blocks of steps, loop and bare in turn.

    Args:
        recipe: what to train.
        blocks: blocks of each kind.
        steps: steps in a block.
    """
    # No evaluation or checkpoint falls inside the blocks: they are work, not overhead. A line is logged every eighth
    # step: a quickstart of three minutes takes about 1,600 steps and logs 200 lines.
    config = load_recipe(
        recipe,
        {"budget": "1000000000steps", "train.log_points": steps // 8, "evaluate.points": 1, "checkpoint.points": 1},
    )
    with tempfile.TemporaryDirectory() as folder:
        display = QuietDisplay()
        session = Session(open_run(config, Path(folder), None, display.message), display)
        batch = session.next_batch(session.most_microbatches)
        loop, bare = [], []
        for block in range(blocks + 1):
            session.clock.budget = Budget(session.clock.spent.steps + steps, "steps")
            session.final_fraction = 0.0
            session.meter.mark()
            start = time.perf_counter()
            spend_budget(session, Signals())
            loop.append((time.perf_counter() - start) / steps)

            state = session.state
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = session.step_function(state, batch, np.float32(0.5))
            jax.block_until_ready(metrics)
            bare.append((time.perf_counter() - start) / steps)
            session.state = state
            if block == 0:  # warm-up
                loop.clear()
                bare.clear()
        device = devices.describe(session.parts.mesh.devices.flat[0])
        session.close()
    return {
        "recipe": recipe,
        "device": device,
        "loop_ms": 1e3 * statistics.median(loop),
        "bare_ms": 1e3 * statistics.median(bare),
        "ratio": statistics.median(a / b for a, b in zip(loop, bare, strict=True)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    row = measure(arguments.recipe, *((3, 10) if arguments.quick else (9, 40)))
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
