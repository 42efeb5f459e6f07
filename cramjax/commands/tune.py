"""`cramjax tune`: a model fine-tuned by a recipe; and `cramjax merge`: its adapter put into its weights."""

from collections.abc import Sequence

from cramjax.commands.common import Parser
from cramjax.commands.train import run_recipe
from cramjax.errors import ConfigError
from cramjax.recipes import tuning_recipe_names


def tune(words: Sequence[str]) -> None:
    """Fine-tune a model, or resume that."""
    given = list(words)
    resuming = any(word == "--resume" or word.startswith("--resume=") for word in given)
    helping = given[:1] in (["-h"], ["--help"])
    if not resuming and not helping:
        if len(given) < 2 or given[0].startswith("-") or given[1].startswith("-"):
            raise ConfigError(
                "cramjax tune needs a model and a recipe: cramjax tune MODEL RECIPE. Recipes: "
                f"{', '.join(tuning_recipe_names())}, or the path of a YAML file."
            )
        model, *given = given
        given.append(f"--model.from={model}")
    run_recipe(
        given,
        command="tune",
        usage="cramjax tune MODEL RECIPE [--out DIR] [--budget=10min] [--GROUP.FIELD=VALUE …]\n"
        "       cramjax tune --resume RUN",
        about="Fine-tune a model (a run or a model directory) on conversations, prompts and completions, or text; "
        f"whole, or by an adapter. Recipes: {', '.join(tuning_recipe_names())}, or the path of a YAML file. Every "
        "option with a dot overrides one field of the recipe.",
    )


def merge(words: Sequence[str]) -> None:
    """Put a model's adapter into its weights."""
    parser = Parser(
        prog="cramjax merge",
        description="Make a model directory of a fine-tuned model with its adapter merged into the weights. Where "
        "these are packed in few bits, they are packed again, and what that changed is said.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="A run directory or a model directory with an adapter.")
    parser.add_argument("--out", metavar="OUT", required=True, help="The model directory to make.")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        default=None,
        help="An adapter of peft's to merge into MODEL, in the place of its own.",
    )
    args = parser.parse_args(words)
    from cramjax.formats.directory import require_new
    from cramjax.tune import merge_model

    require_new(args.out)
    print(merge_model(args.model, args.out, adapter=args.adapter))
