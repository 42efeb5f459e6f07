"""`cramjax fit`: scaling laws of a table of runs."""

import argparse
from collections.abc import Sequence

from cramjax.commands.common import Parser, print_value, require_picture, write_json
from cramjax.errors import RunError


def fit(words: Sequence[str]) -> None:
    """Fit a table of runs."""
    parser = Parser(
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
    require_picture(picture)
    if "by" in given:
        given["by"] = given["by"].split(",")
    from cramjax import fit_scaling

    fit = fit_scaling(given.pop("table"), **given)
    print_value(fit)
    if out:
        write_json(out, fit.json())
    if picture:
        try:
            fit.plot().save(picture)
        except OSError as error:
            raise RunError(f"cannot write {picture}: {error.strerror}. Give another file to --plot.") from None
