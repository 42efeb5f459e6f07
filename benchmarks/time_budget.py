"""Does a time budget end on time? Runs of several budgets while another process takes a core for the middle third.

Prints, for each budget, what was spent against it, the longest step, and the learning rate of the last step. A run
is on
time if it ends within 1% of its budget or within one step, whichever is larger.

    python benchmarks/time_budget.py [--quick] [--json PATH]
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

from cramjax.budget import Budget
from cramjax.recipes import load_recipe
from cramjax.training import train
from cramjax.training.metrics import read_records


def burn(seconds: float) -> None:
    """Keep one core busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def disturb(after: float, seconds: float) -> None:
    """Take a core for some seconds, after some."""
    time.sleep(after)
    process = multiprocessing.get_context("spawn").Process(target=burn, args=(seconds,))
    process.start()
    process.join()


def run(budget: str, recipe: str) -> dict[str, float | str | bool]:
    """Train on a budget under disturbance and say when it ended."""
    seconds = Budget.parse(budget).amount
    config = load_recipe(recipe, {"budget": budget})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        disturber = threading.Thread(target=disturb, args=(seconds / 3, seconds / 3), daemon=True)
        disturber.start()
        summary = train(config, out).summary
        speeds = [r["tokens_per_second"] for r in read_records(out) if r["kind"] == "train"]
        disturber.join()
    tokens_per_step = summary["tokens"] / summary["steps"]
    longest = tokens_per_step / min(speeds)
    late = summary["train_seconds"] - seconds
    return {
        "budget": budget,
        "spent_seconds": summary["train_seconds"],
        "late_seconds": late,
        "late_percent": 100 * late / seconds,
        "longest_step_seconds": longest,
        "fastest_over_slowest": max(speeds) / min(speeds),
        "final_fraction": summary["final_fraction"],
        "final_lr": summary["final_lr"],
        "on_time": abs(late) <= max(0.01 * seconds, longest),
    }


def main() -> None:
    """Run the budgets in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only a 20 s budget")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows = []
    for budget in ["20s"] if arguments.quick else ["30s", "2min", "10min"]:
        rows.append(row := run(budget, arguments.recipe))
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
