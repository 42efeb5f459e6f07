"""Are models as good when Muon iterates in bfloat16, as on GPUs, as when it does in float32, as on CPUs?

Both train on this machine's CPU, in turn, in processes of their own, with the same seeds, data and number of steps;
everything but the iteration is the same, and rounding to bfloat16 is kept where the compiler could leave it out.
Printed are the held-out bits per byte of each pair, and the mean difference with its 95% interval: bfloat16 is as good
if that includes 0 or lies below it. A budget of steps gives the same on a busy machine.

    python benchmarks/muon_precision.py [--budget 400steps] [--seeds 5] [--json PATH] [-- --data.source=my.txt …]
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from cramjax.devices import Target
from cramjax.optim import muon
from cramjax.recipes import load_recipe
from cramjax.scaling.compare.paired import paired_difference
from cramjax.training import train

PLATFORMS = {"float32": "cpu", "bfloat16": "gpu"}
"""Where Muon iterates in a precision."""


def bits_per_byte(precision: str, recipe: str, options: Sequence[str], out: Path) -> float:
    """Train in a process whose Muon takes the device for another; what the model reaches."""
    muon.target = lambda: Target(PLATFORMS[precision], precision, None)
    train(load_recipe(recipe, list(options)), out)
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["bits_per_byte"]


def main() -> None:
    """Train pairs, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt-mini", help="a recipe whose optimizer is Muon (default: %(default)s)")
    parser.add_argument("--budget", default="400steps", help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="pairs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("options", nargs="*", help="changes of the recipe, after `--`: --data.source=my.txt")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_allow_excess_precision=false"
    scores: dict[str, list[float]] = {precision: [] for precision in PLATFORMS}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        for seed in range(args.seeds):
            for precision in list(PLATFORMS)[:: 1 if seed % 2 else -1]:
                options = [*args.options, f"--budget={args.budget}", f"--seed={seed}"]
                out = Path(folder) / f"{seed}-{precision}"
                scores[precision].append(pool.submit(bits_per_byte, precision, args.recipe, options, out).result())
            low, full = scores["bfloat16"][-1], scores["float32"][-1]
            print(f"seed {seed}: float32 {full:.4f}, bfloat16 {low:.4f}, difference {low - full:+.4f}", flush=True)
    found = paired_difference([low - full for low, full in zip(scores["bfloat16"], scores["float32"], strict=True)])
    interval = "" if found.interval is None else f", 95% interval {found.interval[0]:+.4f} to {found.interval[1]:+.4f}"
    print(f"{args.recipe}, {args.budget}, bfloat16 − float32 in bits per byte: {found.mean:+.4f}{interval}")
    if args.json:
        args.json.write_text(
            json.dumps({"recipe": args.recipe, "budget": args.budget, **scores}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
