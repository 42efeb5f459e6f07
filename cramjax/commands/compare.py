"""`cramjax compare`: which of two recipes is better, by how much, and how sure that is."""

import argparse
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from cramjax.commands.common import print_value, require_directories, require_picture, write_json
from cramjax.errors import ConfigError, RunError, RunInterruptedError
from cramjax.recipes import add_config_options, load_recipe, override, parse_arguments, recipe_names


def compare(words: Sequence[str]) -> None:
    """Compare two recipes on one budget."""
    parser = ArgumentParser(
        prog="cramjax compare",
        usage="cramjax compare A [B] [--with FIELD=VALUE …] [--budget=5min] [--seeds 5] [--out DIR] "
        "[--GROUP.FIELD=VALUE …]",
        description="Train two recipes with the same seeds and data, in turn, and say which is better on what is held "
        "out, by bits per byte (on labels and preferences by accuracy, on numbers by squared error): the mean "
        "difference, its 95% interval, and how many seeds would settle it. Every option with a dot, and --budget, is "
        f"for both. Recipes: {', '.join(recipe_names())}, or the path of a YAML file.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for flag, options in {
        "a": {"metavar": "A", "nargs": "?", "help": "Name of a recipe, or a YAML file."},
        "b": {"metavar": "B", "nargs": "?", "help": "Another (default: A itself, changed by --with)."},
        "--with": {
            "metavar": "FIELD=VALUE",
            "nargs": "+",
            "action": "extend",
            "help": "Fields to change in B alone, such as optim.lr=0.03.",
        },
        "--seeds": {"metavar": "N", "type": int, "help": "Pairs of runs (default: 5)."},
        "--out": {
            "metavar": "DIR",
            "help": "Where runs and results go (default: runs/compare-DATE-TIME). A comparison that is there goes on: "
            "after an interruption, or to more --seeds.",
        },
        "--json": {"metavar": "OUT", "help": "Also write the result to this file."},
        "--plot": {"metavar": "OUT", "help": "Also draw it into this file (.png, .svg, .pdf)."},
    }.items():
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)
    add_config_options(parser)
    given = parse_arguments(parser, words).as_dict()
    names = [given.pop(key, None) for key in ("a", "b")]
    changes, out, json_file, picture = (given.pop(key, None) for key in ("with", "out", "json", "plot"))
    asked = {"seeds": given.pop("seeds")} if "seeds" in given else {}
    if names[0] is None or (names[1] is None and not changes):
        raise ConfigError("cramjax compare needs two recipes, or one and --with FIELD=VALUE. See --help.")
    require_directories({"--json": json_file, "--plot": picture})
    require_picture(picture)
    # Their mistakes before what takes time.
    configs = [load_recipe(name, given) for name in names if name is not None]
    override(configs[-1], changes or ())
    from cramjax import compare

    comparison = compare(*names, changes=changes, out=out, **asked, **given)
    print_value(comparison)
    if json_file is not None:
        write_json(json_file, comparison.json())
    if picture is not None:
        comparison.plot().save(picture)
    if comparison.interrupted_by is not None:
        raise RunInterruptedError(
            f"stopped. Continue with the same command and --out {comparison.path}", comparison.interrupted_by
        )
    if comparison.difference is None:
        raise RunError(" ".join([comparison.verdict, *comparison.notes]))
