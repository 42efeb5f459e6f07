"""`cramjax sweep`: many runs that differ along axes, and one table of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cramjax.commands.common import Parser
from cramjax.errors import RunError
from cramjax.recipes import add_config_options, parse_arguments, sweep_path


def sweep(words: Sequence[str]) -> None:
    """Run what a sweep lacks, and print where its table is."""
    parser = Parser(
        prog="cramjax sweep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every trial of a sweep. Run again, it continues: done trials are kept, interrupted ones go\n"
        "on from their checkpoints, failed ones are tried once more.",
        epilog="A sweep is a YAML file:\n"
        "  base: gpt-mini                          # a recipe\n"
        "  set: {evaluate.points: 4}               # fields that differ from it in every trial\n"
        "  axes:                                   # combined with each other\n"
        "    grid: {optim.lr: [0.01, 0.02]}        # all combinations\n"
        "    zip: {seed: [0, 1], data.order: [shuffled, sentence_length]}   # taken together\n"
        "    isoflop: {budgets: [1e12flop, 4e12flop], sizes: [300k, 600k, 1.2M]}\n\n"
        "isoflop derives width, depth, heads, batch and learning rates from each size. sizes may also be a list of\n"
        "lists, one for each budget; count: params_non_embedding counts the blocks alone; tuned_at: 1e14flop lets the\n"
        "batch grow with the budget from the base's.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", metavar="SWEEP", help="Name of a sweep, or a YAML file.")
    parser.add_argument("--out", metavar="DIR", help="The sweep's directory (default: sweeps/SWEEP).")
    parser.add_argument(
        "--engine",
        choices=("local", "ray", "slurm"),
        default="local",
        help="local: processes on this machine, one for each GPU or share of the cores. ray: tasks of Ray. slurm: an "
        "array job. ray and slurm need the extra `sweep` (default: %(default)s).",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="Trials at the same time (default: all there is room for)."
    )
    parser.add_argument("--address", help="Of a Ray cluster: HOST:PORT, or auto (default: a Ray on this machine).")
    parser.add_argument("--cpus", type=int, metavar="N", help="Of each trial, with ray or slurm (default: 1).")
    parser.add_argument("--gpus", type=float, metavar="N", help="Of each trial, with ray or slurm (default: 0).")
    parser.add_argument(
        "--set", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="Override a field in every trial."
    )
    parser.add_argument("--dry_run", action="store_true", help="List the trials, and run nothing.")
    given = parser.parse_args(words)
    path, overrides = sweep_path(given.sweep), _overrides(given.set)
    if given.dry_run:
        _list(path, overrides)
        return
    from cramjax.scaling.sweep.display import make_display
    from cramjax.scaling.sweep.run import run_sweep

    out = Path(given.out) if given.out else Path("sweeps") / path.stem
    result = run_sweep(
        path,
        out,
        engine=given.engine,
        overrides=overrides,
        jobs=given.jobs,
        address=given.address,
        cpus=given.cpus,
        gpus=given.gpus,
        display=make_display(out),
    )
    print(result.table)
    failed = [row for row in result.rows if row["status"] == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(result.rows)} trials failed; the table says why. Mend that and run the same "
            f"command again. The first, {failed[0]['name']}: {failed[0]['error']}"
        )


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    parser = ArgumentParser(prog="cramjax sweep --set", exit_on_error=False, allow_abbrev=False)
    add_config_options(parser)
    return parse_arguments(parser, [f"--{word}" for word in words]).as_dict()


def _list(path: Path, overrides: dict[str, Any]) -> None:
    from cramjax.scaling.shapes import parameters_of
    from cramjax.scaling.sweep.axes import read_sweep

    for trial in read_sweep(path, overrides):
        config, counted = trial.config, parameters_of(trial.config)
        model = config.model
        print(
            f"{trial.name}: {config.budget}, {counted.total:,} parameters ({counted.blocks:,} in blocks), "
            f"{model.layers} layers × {model.width}, {model.heads} heads, batch {config.batch.size}, "
            f"lr {config.optim.lr:g}"
        )
