"""`cramjax train`: a run from a recipe, or an interrupted one to its end."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jsonargparse import ArgumentParser

from cramjax.errors import ConfigError
from cramjax.recipes import add_config_options, load_recipe, parse_arguments, recipe_names, recipe_path, to_yaml


def train(words: Sequence[str]) -> None:
    """Train a recipe, or resume a run."""
    run_recipe(
        words,
        command="train",
        usage="cramjax train RECIPE [--out DIR] [--budget=10min] [--GROUP.FIELD=VALUE …]\n"
        "       cramjax train --resume RUN",
        about=f"Train a language model on a fixed budget. Recipes: {', '.join(recipe_names())}, or the path of a YAML "
        "file. Every option with a dot overrides one field of the recipe.",
    )


def run_recipe(words: Sequence[str], *, command: str, usage: str, about: str) -> None:
    """Run a recipe, or go on with a run.

    Args:
        words: of the command line.
        command: that was given.
        usage: of it.
        about: what it does.
    """
    parser = ArgumentParser(
        prog=f"cramjax {command}",
        usage=usage,
        description=about,
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
                f"a resumed run keeps its own configuration and directory: give `cramjax {command} --resume {resume}`, "
                "with nothing else but perhaps a larger --budget."
            )
        _resume(Path(resume), given.get("budget"), bool(show))
        return
    if recipe is None:
        raise ConfigError(f"cramjax {command} needs a recipe: {', '.join(recipe_names())}, or the path of a YAML file.")
    config = load_recipe(recipe, given)
    if config.start_from is not None:
        from cramjax.training.continuing import continued

        config = continued(config)
    if show:
        print(to_yaml(config), end="")
        return
    from cramjax.finish import finish
    from cramjax.planning import fit
    from cramjax.training import train
    from cramjax.training.display import make_display

    path = Path(out) if out else Path("runs") / f"{recipe_path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    display = make_display()
    finish(train(fit(config, display.message), path, display=display), display)


def _resume(path: Path, budget: str | None, show: bool) -> None:
    from cramjax.finish import finish
    from cramjax.training import resume
    from cramjax.training.display import make_display
    from cramjax.training.run import config_text, load_run, read_config

    if show:
        print(config_text(read_config(path)), end="")
        return
    display = make_display()
    trained = budget is None and (path / "summary.json").exists() and not (path / "report.html").exists()
    finish(load_run(path) if trained else resume(path, budget=budget, display=display), display)
