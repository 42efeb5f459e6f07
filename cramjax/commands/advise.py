"""`cramjax advise`: what to train for a budget, by a fit, as a recipe."""

import os
from collections.abc import Sequence
from pathlib import Path

from cramjax.commands.common import Parser, print_value, require_directories, write_json
from cramjax.errors import RunError


def advise(words: Sequence[str]) -> None:
    """Advise on a budget."""
    parser = Parser(
        prog="cramjax advise",
        description="Say what to train for a budget: size, shape, tokens, batch, learning rates and weight decay, and "
        "the loss and bits per byte to expect. Nothing is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("--fit", required=True, metavar="FIT", help="What `cramjax fit TABLE --json FIT` wrote.")
    parser.add_argument("--budget", required=True, help="A time (24h), tokens (3Gtok) or FLOPs (1e19flop).")
    parser.add_argument(
        "--recipe",
        default="gpt-124m",
        help="The family of models, with data, tokenizer and hyperparameters that work at its own size: that of the "
        "fit's runs (default: %(default)s).",
    )
    parser.add_argument(
        "--tuned_at",
        metavar="BUDGET",
        help="What the recipe's batch and weight decay are right for (default: the recipe's own budget).",
    )
    parser.add_argument("--device", metavar="NAME", help="A card, such as rtx4090, or cpu (default: what there is).")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="How many of them (default: 1).")
    parser.add_argument("--out", metavar="RECIPE", help="Also write the run as a recipe: `cramjax train RECIPE`.")
    parser.add_argument("--json", metavar="OUT", help="Also write the advice to this file.")
    given = parser.parse_args(words)
    require_directories({"--out": given.out, "--json": given.json})
    from cramjax.recipes import load_recipe, to_yaml
    from cramjax.scaling.fit.scaling_fit import read_fit

    fit, base = read_fit(given.fit), load_recipe(given.recipe)
    if given.device is not None:  # as of `cramjax plan`
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from cramjax.scaling.advice.recommendation import recommend

    made = recommend(fit, base, given.budget, device=given.device, devices=given.devices, tuned_at=given.tuned_at)
    print_value(made)
    if given.out is not None:
        header = f"# cramjax advise: {made.params:,} parameters for {given.budget}, of the family of {given.recipe}.\n"
        try:
            Path(given.out).write_text(header + to_yaml(made.config), encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {given.out}: {error.strerror}. Give another file to --out.") from None
    if given.json is not None:
        write_json(given.json, made.json())
