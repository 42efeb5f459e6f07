"""The command line: parse, call, print. A user's mistake is one sentence on standard error and exit code 2.

Everything that needs jax is imported inside the commands, so that `--help` and configuration errors are instant.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser

from cramjax.errors import ConfigError, RunError, RunInterruptedError, UserError
from cramjax.recipes import add_config_options, load_recipe, parse_arguments, recipe_names, recipe_path, to_yaml

_SUMMARY = """usage: cramjax COMMAND …

Train the best language model a fixed budget can buy, on the hardware you have.

  cramjax train RECIPE [--budget=10min] [--out DIR] [--GROUP.FIELD=VALUE …]
  cramjax train --resume RUN
  cramjax generate RUN [PROMPT …]
  cramjax fill-mask RUN TEXT
  cramjax evaluate RUN [--text FILE …] [--json OUT]
  cramjax plan RECIPE [--device rtx4090] [--budget=24h] [--GROUP.FIELD=VALUE …]
  cramjax fit TABLE [--method METHOD] [--json OUT] [--plot OUT.png]

`cramjax COMMAND --help` explains each; `cramjax --version` prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `cramjax`; default: those of the process.

    Returns:
        The exit code: 0; 2 after a mistake of the user's; 128 + the signal's number after an interrupted run.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_SUMMARY, end="")
        elif words[0] == "--version":
            print(f"cramjax {version('cramjax')}")
        elif words[0] in _COMMANDS:
            _COMMANDS[words[0]](words[1:])
        else:
            raise ConfigError(f"there is no command {words[0]!r}. Commands: {', '.join(_COMMANDS)}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a directory that cannot be written, a disk that is full
        print(f"error: {error}. Mend that, and run the same command (or cramjax train --resume RUN).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after training, which catches signals itself
        print("interrupted", file=sys.stderr)
        return 130
    except RunInterruptedError as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal_number  # what a shell reports of a process that a signal ended
    return 0


def _train(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="cramjax train",
        usage="cramjax train RECIPE [--out DIR] [--budget=10min] [--GROUP.FIELD=VALUE …]\n"
        "       cramjax train --resume RUN",
        description=f"Train a language model on a fixed budget. Recipes: {', '.join(recipe_names())}, or the path of a "
        "YAML file. Every option with a dot overrides one field of the recipe.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own prints defaults, not the recipe
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", default=argparse.SUPPRESS, help="Name of a recipe, or a YAML file."
    )
    parser.add_argument(
        "--out", metavar="DIR", default=argparse.SUPPRESS, help="The new run directory. Default: runs/RECIPE-DATE-TIME."
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="Continue an interrupted run to the end of its budget; nothing else is needed. With --budget, the "
        "whole run, what is spent included, gets a new budget, and schedules go on from the fraction then spent.",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print the resolved configuration and stop.",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Trace a few of the first steps for TensorBoard's profile plugin: short for --train.profile=true.",
    )
    add_config_options(parser)
    given = parse_arguments(parser, words).as_dict()
    recipe, out, resume, show = (given.pop(key, None) for key in ("recipe", "out", "resume", "print_config"))
    if given.pop("profile", False):
        given.setdefault("train", {})["profile"] = True

    if resume is not None:
        if recipe is not None or out is not None or set(given) - {"budget"}:
            raise ConfigError(
                f"a resumed run keeps its own configuration and directory: give `cramjax train --resume {resume}`, "
                "with nothing else but perhaps a larger --budget."
            )
        _resume(Path(resume), given.get("budget"), bool(show))
        return
    if recipe is None:
        raise ConfigError(f"cramjax train needs a recipe: {', '.join(recipe_names())}, or the path of a YAML file.")
    config = load_recipe(recipe, given)
    if show:
        print(to_yaml(config), end="")
        return
    from cramjax.finish import finish
    from cramjax.planning import fit
    from cramjax.train import train
    from cramjax.train.display import make_display

    path = Path(out) if out else Path("runs") / f"{recipe_path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    display = make_display()
    finish(train(fit(config, display.message), path, display=display), display)


def _resume(path: Path, budget: str | None, show: bool) -> None:
    from cramjax.finish import finish
    from cramjax.train import resume
    from cramjax.train.display import make_display
    from cramjax.train.run import load_run, read_config

    if show:
        print(to_yaml(read_config(path)), end="")
        return
    display = make_display()
    trained = budget is None and (path / "summary.json").exists() and not (path / "report.html").exists()
    finish(load_run(path) if trained else resume(path, budget=budget, display=display), display)


def _generate(words: Sequence[str]) -> None:
    parser = _run_parser("generate", "Continue prompts with a trained causal model.")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="Texts to continue. Default: the empty text.")
    parser.add_argument("--max_tokens", type=int, default=128, help="Most tokens to add (default: %(default)s).")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)."
    )
    parser.add_argument("--top_k", type=int, default=None, help="Draw from this many likeliest tokens only.")
    parser.add_argument("--top_p", type=float, default=None, help="Draw from the likeliest tokens of this mass only.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (default: %(default)s).")
    args = parser.parse_args(words)
    from cramjax.serve import generate
    from cramjax.train import load_run

    generations = generate(
        load_run(args.run, args.checkpoint),
        args.prompts or [""],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print("\n\n".join(map(str, generations)))


def _fill_mask(words: Sequence[str]) -> None:
    parser = _run_parser("fill-mask", "Fill each [MASK] of a text with a trained masked model.")
    parser.add_argument("text", metavar="TEXT", help="A text with [MASK] in it.")
    parser.add_argument("--top", type=int, default=5, help="Candidates shown per mask (default: %(default)s).")
    args = parser.parse_args(words)
    from cramjax.serve import fill_mask
    from cramjax.train import load_run

    print(fill_mask(load_run(args.run, args.checkpoint), args.text, top=args.top))


def _evaluate(words: Sequence[str]) -> None:
    parser = _run_parser("evaluate", "Score text with a trained model: bits per byte, perplexity, accuracy.")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", default=None, help="Text files. Default: the run's held-out text."
    )
    parser.add_argument("--json", metavar="OUT", default=None, help="Also write the scores to this file.")
    args = parser.parse_args(words)
    from dataclasses import asdict

    from cramjax.evaluate import evaluate_text
    from cramjax.train import load_run

    evaluation = evaluate_text(load_run(args.run, args.checkpoint), args.text)
    print(evaluation)
    if args.json:
        _write_json(args.json, asdict(evaluation))


def _fit(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="cramjax fit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fit scaling laws to a table of runs (CSV or Parquet; one row for each run).",
        epilog="Parameters are counted as the column given to --params counts them: with embeddings (params), say, or\n"
        "without (params_non_embedding). Advice and exponents are then of that count.\n\n"
        "A power law through optima that are already estimated, one for each group of rows, with weights 1/std²:\n"
        "  cramjax fit optima.csv --method power-law --x flops --y n --std n_star_std --by dataset,hparams",
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="A CSV or Parquet file.")
    parser.add_argument(
        "--method",
        choices=("auto", "parametric", "isoflop", "envelope", "power-law"),
        default="auto",
        help="parametric: L = E + A/N^α + B/D^β. isoflop: a parabola for each budget, power laws through the minima. "
        "envelope: power laws along the lowest of several training curves. power-law: y = c·x^p. auto: parametric, and "
        "isoflop where runs share budgets (default: %(default)s).",
    )
    columns = parser.add_argument_group("columns of runs")
    columns.add_argument("--params", metavar="COLUMN", help="Parameters, N (default: params).")
    columns.add_argument("--tokens", metavar="COLUMN", help="Tokens trained on, D (default: tokens).")
    columns.add_argument("--loss", metavar="COLUMN", help="The loss reached, L (default: loss).")
    columns.add_argument(
        "--flops", metavar="COLUMN", help="Training FLOPs, or 6ND (default: flops if there, else 6·params·tokens)."
    )
    columns.add_argument("--run", metavar="COLUMN", help="Tells training curves apart (default: run if there, else N).")
    options = parser.add_argument_group("how")
    options.add_argument(
        "--solver",
        choices=("variable-projection", "l-bfgs"),
        help="Of the parametric law; both reach the same minimum.",
    )
    options.add_argument(
        "--intervals",
        choices=("profile", "bootstrap"),
        help="Of the parametric law, 95%%. profile (default): for E, α and β together. bootstrap: each for itself.",
    )
    options.add_argument("--delta", type=float, help="Of the Huber loss of log L (default: 1e-3).")
    options.add_argument("--samples", type=int, help="Of bootstraps (default: 1000).")
    options.add_argument("--seed", type=int, help="Of bootstraps (default: 0).")
    optima = parser.add_argument_group("columns of optima, for --method power-law")
    optima.add_argument("--x", metavar="COLUMN", help="x (default: flops).")
    optima.add_argument("--y", metavar="COLUMN", help="y (default: params).")
    optima.add_argument("--std", metavar="COLUMN", help="Standard deviations of log y (default: all alike).")
    optima.add_argument("--by", metavar="COLUMNS", help="Columns that make groups, joined with commas.")
    parser.add_argument("--json", metavar="OUT", help="Also write coefficients, exponents and intervals to this file.")
    parser.add_argument("--plot", metavar="OUT", help="Also draw the figures: a .png, .svg or .pdf file.")
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    out, picture = given.pop("json", None), given.pop("plot", None)
    if picture and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot must be a .png, .svg or .pdf file, got {picture!r}.")
    if "by" in given:
        given["by"] = given["by"].split(",")
    from cramjax import fit_scaling

    fit = fit_scaling(given.pop("table"), **given)
    print(fit)
    if out:
        _write_json(out, fit.json())
    if picture:
        try:
            fit.plot().save(picture)
        except OSError as error:
            raise RunError(f"cannot write {picture}: {error.strerror}. Give another file to --plot.") from None


def _write_json(path: str, content: object) -> None:
    try:
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Give another file to --json.") from None


def _plan(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="cramjax plan",
        usage="cramjax plan RECIPE [--device rtx4090] [--devices N] [--budget=24h] [--GROUP.FIELD=VALUE …]",
        description="Say what of a recipe fits a device, how fast it will go, and what a budget will buy; nothing is "
        f"trained. Recipes: {', '.join(recipe_names())}, or the path of a YAML file. Every option with a dot overrides "
        "one field of the recipe.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for flag, options in {
        "recipe": {"metavar": "RECIPE", "nargs": "?", "help": "Name of a recipe, or a YAML file."},
        "--device": {"metavar": "NAME", "help": "A card, such as rtx4090, or cpu. Default: the device there is."},
        "--devices": {"metavar": "N", "type": int, "help": "How many of them (default: 1)."},
        "--price": {"metavar": "X", "type": float, "help": "Price of an hour of all devices, to say what it costs."},
        "--exact": {
            "action": "store_true",
            "help": "Also compile the step for the device, and report the compiler's bytes (extra: cramjax[aot]).",
        },
        "--json": {"metavar": "OUT", "help": "Also write the plan to this file."},
        "--plot": {"metavar": "OUT", "help": "Also draw each policy's memory into this file (.png, .svg, .pdf)."},
    }.items():
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)
    add_config_options(parser)
    given = parse_arguments(parser, words).as_dict()
    recipe, out, picture = (given.pop(key, None) for key in ("recipe", "json", "plot"))
    asked = {key: given.pop(key) for key in ("device", "devices", "price", "exact") if key in given}
    if recipe is None:
        raise ConfigError(f"cramjax plan needs a recipe: {', '.join(recipe_names())}, or the path of a YAML file.")
    for option, path in (("--json", out), ("--plot", picture)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise RunError(f"cannot write {path}: there is no such directory. Give another file to {option}.")
    if picture is not None and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise RunError(f"cannot draw into {picture}: give --plot a file that ends in .png, .svg or .pdf.")
    load_recipe(recipe, given)  # its mistakes before those that need jax to be found
    if "device" in asked:  # JAX's plugin compiles for a GPU that is not here only if it is not told to look for one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from cramjax.planning import plan

    made = plan(recipe, **asked, **given)
    Console().print(made)
    if out is not None:
        _write_json(out, made.json())
    if picture is not None:
        made.plot().save(picture)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


def _run_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser of commands that read a run."""
    parser = _Parser(prog=f"cramjax {command}", description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="A run directory.")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="The newest weights, or those with the lowest held-out bits per byte (default: %(default)s).",
    )
    return parser


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "generate": _generate,
    "fill-mask": _fill_mask,
    "evaluate": _evaluate,
    "plan": _plan,
    "fit": _fit,
}

if __name__ == "__main__":
    sys.exit(main())
