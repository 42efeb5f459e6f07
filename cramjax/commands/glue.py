"""`cramjax glue`: a model fine-tuned on GLUE's tasks, or others, by Cramming's protocol."""

from collections.abc import Sequence

from cramjax.commands.common import Parser, print_value, require_directories, write_json
from cramjax.errors import ConfigError


def glue(words: Sequence[str]) -> None:
    """Tune a model on tasks, and say what it reaches."""
    parser = Parser(
        prog="cramjax glue",
        description="Fine-tune a model on each task with one set of hyperparameters (the recipe tune-classify) and "
        "several seeds; print medians, their average, and Cramming's published table beside GLUE's tasks. DIR holds "
        "GLUE's directories as its download or Hugging Face has them (TSV, JSONL, Parquet), or directories with a "
        "task.yaml (train, validation, fields, metric): these are never called GLUE. A seed that is done is not run "
        "again.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="A run directory or a model directory.")
    parser.add_argument("--data", metavar="DIR", required=True, help="The directory of the tasks.")
    parser.add_argument("--out", metavar="DIR", required=True, help="The directory of runs and scores.")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=None, help="Names of tasks. Default: all.")
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="Runs of each task (default: %(default)s).")
    parser.add_argument(
        "--epochs", metavar="N", type=float, default=5.0, help="Over the training rows (default: %(default)s)."
    )
    parser.add_argument(
        "--set",
        metavar="GROUP.FIELD=VALUE",
        nargs="+",
        default=[],
        help="Changes to the recipe, the same for all tasks; what is no longer Cramming's is said.",
    )
    parser.add_argument("--json", metavar="OUT", default=None, help="Also write the scores to this file.")
    args = parser.parse_args(words)
    if args.seeds < 1 or not 0 < args.epochs < 1e6:
        raise ConfigError(f"--seeds and --epochs must be above 0, got {args.seeds} and {args.epochs:g}.")
    require_directories({"--json": args.json})
    from rich.console import Console

    from cramjax.glue import run_protocol

    console = Console(stderr=True)
    options = {"tasks": args.tasks, "seeds": args.seeds, "epochs": args.epochs, "overrides": args.set}
    made = run_protocol(args.model, args.data, args.out, say=console.print, **options)
    print_value(made)
    if args.json:
        write_json(args.json, made.json())
