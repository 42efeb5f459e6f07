"""Does a budget buy what the plan said? Plans a recipe on this CPU, trains it, and compares tokens.

The plan times the real step for a few seconds, so nothing else should run meanwhile, nor during the run.

    python benchmarks/plan_budget.py [--recipe gpt-mini] [--budget 5min] [--GROUP.FIELD=VALUE …]
"""

import argparse
import tempfile
from pathlib import Path

from cramjax.data import prepare
from cramjax.planning import plan
from cramjax.recipes import load_recipe
from cramjax.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt-mini")
    parser.add_argument("--budget", default="5min")
    arguments, overrides = parser.parse_known_args()
    config = load_recipe(arguments.recipe, [*overrides, f"--budget={arguments.budget}"])
    prepare(config.data, config.tokenizer)
    planned = plan(config, "cpu")
    print(planned, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        summary = train(config, Path(directory) / "run").summary
    predicted, achieved = planned.purchase.tokens, summary["tokens"]
    print(
        f"{arguments.recipe}, {arguments.budget}: planned {predicted:,.0f} tokens, trained on {achieved:,} "
        f"({predicted / achieved - 1:+.1%}); {planned.chosen.tokens_per_second:,.0f} tokens/s planned in steps, "
        f"{summary['tokens_per_second']:,.0f} measured"
    )


if __name__ == "__main__":
    main()
