"""`cramjax plan`: what fits, how fast, what the budget buys."""

import argparse
import os
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from cramjax.commands.common import print_value, require_directories, require_picture, write_json
from cramjax.commands.compress import plan_compressed
from cramjax.commands.offload import plan_offloaded
from cramjax.errors import ConfigError
from cramjax.model_yaml import is_model_directory, model_config
from cramjax.recipes import add_config_options, load_recipe, parse_arguments, recipe_names


def plan(words: Sequence[str]) -> None:
    """Plan a recipe for a device."""
    if "--generate" in words:
        return plan_offloaded(words)
    if any(word.split("=")[0] == "--compress" for word in words):
        return plan_compressed(words)
    parser = ArgumentParser(
        prog="cramjax plan",
        usage="cramjax plan RECIPE [--device rtx4090] [--devices N] [--budget=24h] [--GROUP.FIELD=VALUE …]",
        description="Say what of a recipe fits a device, how fast it will go, and what a budget will buy; nothing is "
        f"trained. Recipes: {', '.join(recipe_names())}, the path of a YAML file, or a model directory. "
        "Every option with a dot overrides one field of the recipe. For generation with a model larger than memory, "
        "see `cramjax plan --generate --help`; for a compression, `cramjax plan --compress --help`.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for flag, options in {
        "recipe": {"metavar": "RECIPE", "nargs": "?", "help": "Name of a recipe, a YAML file, or a model directory."},
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
    require_directories({"--json": out, "--plot": picture})
    require_picture(picture)
    # Its mistakes before those that need jax to be found:
    (model_config if is_model_directory(recipe) else load_recipe)(recipe, given)
    if "device" in asked:  # JAX's plugin compiles for a GPU that is not here only if it is not told to look for one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from cramjax.planning import plan

    made = plan(recipe, **asked, **given)
    print_value(made)
    if out is not None:
        write_json(out, made.json())
    if picture is not None:
        made.plot().save(picture)
