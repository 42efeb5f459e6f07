"""CramJAX trains the best language model that a fixed budget can buy.

In a notebook:

    import cramjax

    config = cramjax.recipe("quickstart", budget="1min")
    cramjax.plan(config)
    run = cramjax.train(config)
    run.plot()
    cramjax.generate(run, "def main(")
    cramjax.evaluate(run)

Every function imports what it needs when it is called, so that importing the package costs nothing.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cramjax.notices import import_jax_quietly

if TYPE_CHECKING:
    from cramjax.checking import Check
    from cramjax.config import RunConfig
    from cramjax.language_model import LanguageModel
    from cramjax.planning import Plan
    from cramjax.scaling import PowerLaws, Recommendation, ScalingFit
    from cramjax.scaling.compare.comparison import Comparison
    from cramjax.scaling.sweep.run import Sweep
    from cramjax.serve import Generation
    from cramjax.training import Evaluation, PairEvaluation, Run

__all__ = [
    "advise",
    "check",
    "compare",
    "evaluate",
    "fit_scaling",
    "generate",
    "import_model",
    "load",
    "plan",
    "recipe",
    "sweep",
    "train",
]


def recipe(name: str | Path, **overrides: Any) -> "RunConfig":
    """A run's configuration, from a recipe and what you would change in it.

    Args:
        name: the name of a recipe (`quickstart`) or the path of a YAML file.
        overrides: fields by name, those of groups as mappings: `budget="1min", optim={"lr": 2e-3}`.

    Raises:
        ConfigError: unknown recipe or field, wrong type, impossible combination.
    """
    from cramjax.recipes import load_recipe

    return load_recipe(name, overrides)


def check(*, quick: bool = False, kernels: Sequence[str] | None = None, quiet: bool = False) -> "Check":
    """Check a machine that is new: devices, versions, ceilings, every kernel against float32, a small training step.

    Args:
        quick: smaller shapes, and one precision.
        kernels: names of those to check. Default: all.
        quiet: show nothing meanwhile.

    Raises:
        ConfigError: there is no kernel of a name, or a GPU that cannot be used.
    """
    from rich.console import Console

    from cramjax.checking import check as check_machine
    from cramjax.show.live import ProgressDisplay

    with ProgressDisplay(None if quiet else Console(stderr=True)) as display:
        return check_machine(quick=quick, kernels=kernels, tell=display)


def plan(
    config: "RunConfig | str | Path",
    device: str | None = None,
    *,
    devices: int = 1,
    budget: str | None = None,
    price: float | None = None,
    exact: bool = False,
    policies: Sequence[str] | None = None,
    **overrides: Any,
) -> "Plan":
    """Say what of a run fits a device, how fast it will go, and what a budget will buy; nothing is trained.

    Args:
        config: from `recipe`, or the name of a recipe.
        device: a card (`rtx4090`, `a100-80gb`), or `cpu`. Default: the device there is.
        devices: how many of them.
        budget: what is spent. Default: the configuration's.
        price: of an hour of all devices.
        exact: also compile the step for the device, and report the compiler's bytes.
        policies: what to consider: `none`, `selective`, `full`, `offload`, and each with `+offload_optimizer`.
        overrides: as for `recipe`, when `config` is a name.

    Raises:
        ConfigError: the device or the budget cannot be, or the model fits under no policy.
    """
    from cramjax.planning.plan import plan as make_plan

    options = {"budget": budget, "price": price, "exact": exact, "policies": policies}
    return make_plan(config, device, devices=devices, **options, **overrides)


def train(
    config: "RunConfig | str | Path", out: str | Path | None = None, *, quiet: bool = False, **overrides: Any
) -> "Run":
    """Train a model until its budget is spent, then sample from it and write its report.

    Args:
        config: from `recipe`, or the name of a recipe.
        out: the run directory to make. Default: a new one under `runs/`.
        quiet: show nothing meanwhile.
        overrides: as for `recipe`, when `config` is a name.

    Raises:
        UserError: the configuration, the data or the directory cannot be used.
    """
    from cramjax.config import RunConfig
    from cramjax.errors import ConfigError
    from cramjax.finish import finish
    from cramjax.planning import fit
    from cramjax.recipes import recipe_path
    from cramjax.training.display import make_display
    from cramjax.training.loop import train as spend_budget

    name = "run"
    if not isinstance(config, RunConfig):
        name, config = recipe_path(config).stem, recipe(config, **overrides)
    elif overrides:
        raise ConfigError(f"{', '.join(overrides)}: give overrides to `recipe`, where the configuration is made.")
    path = Path(out) if out is not None else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    display = make_display(quiet=quiet)
    return finish(spend_budget(fit(config, display.message), path, display=display), display)


def load(path: str | Path, checkpoint: Literal["best", "latest"] = "latest") -> "Run | LanguageModel":
    """Load a run directory or a model directory, to generate and evaluate with it.

    Args:
        path: the directory that training or an import made.
        checkpoint: of a run: the newest weights, or those with the lowest held-out bits per byte.

    Raises:
        UserError: it is neither, holds no intact checkpoint, or a file of it is damaged.
    """
    from cramjax.training.given import load

    return load(path, checkpoint)


def import_model(
    source: str | Path,
    out: str | Path | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    codes: bool = False,
) -> "LanguageModel":
    """Read another library's model, to generate and evaluate with it, or to export it again (`model.export`).

    Families: GPT-2, Llama (SmolLM2), Mistral, Mixtral, Qwen 2 and 3 (with experts too), SmolLM3, Gemma 2 and 3 (text),
    NanoChat, BERT, RoBERTa, ModernBERT.

    Args:
        source: a Hugging Face directory, `hub:NAME`, or a GGUF file.
        out: a model directory to make of it. Default: none.
        dtype: precision of the weights. Default: bfloat16 if all are stored in it, else float32.
        codes: keep the codes of quantised matrices where ours can hold them. Default: they become numbers.

    Raises:
        UserError: it cannot be read as a model of one of these families, or the directory exists.
    """
    from cramjax.language_model import import_model as read

    return read(source, out, dtype=dtype, codes=codes)


def generate(
    run: "Run | LanguageModel | str | Path",
    prompt: str = "",
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
) -> "Generation":
    """Continue a prompt with a causal model.

    Args:
        run: from `train`, `load` or `import_model`, or the path of a run or a model directory.
        prompt: text to continue; the empty text starts a document.
        max_tokens: most tokens to add.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability only.
        seed: seed of the draws.
        chat: take the prompt for what a user says, and let the model answer, by its chat template.

    Raises:
        UserError: the model is not causal, or a value is out of range.
    """
    from cramjax.serve import generate as continue_prompts

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "chat": chat}
    return continue_prompts(run, prompt, max_tokens=max_tokens, **options)[0]


def evaluate(
    run: "Run | LanguageModel | str | Path", text: str | Path | Sequence[str | Path] | None = None
) -> "Evaluation | PairEvaluation":
    """Score text: bits per byte, loss, perplexity, accuracy; a run's own preferences: loss and accuracy of pairs.

    Args:
        run: from `train`, `load` or `import_model`, or the path of a run or a model directory.
        text: files to score. Default: the run's own held-out text.

    Raises:
        UserError: a file is missing, empty or not text, or a model that is no run is given without files.
    """
    from cramjax.evaluation import evaluate_text

    return evaluate_text(run, text)


def compare(
    a: "RunConfig | str | Path",
    b: "RunConfig | str | Path | None" = None,
    *,
    changes: Mapping[str, Any] | Sequence[str] | None = None,
    seeds: int = 5,
    out: str | Path | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> "Comparison":
    """Train two recipes on one budget with the same seeds, in turn, and say which is better and how sure that is.

    Every run is a process of its own; programs are compiled and data is prepared before, outside the budgets.

    Args:
        a: from `recipe`, or the name of a recipe.
        b: another. Default: `a`, changed by `changes`.
        changes: fields to change in B alone: `{"optim": {"lr": 0.03}}` or `["optim.lr=0.03"]`.
        seeds: pairs of runs.
        out: the directory of runs and results; one that holds the same comparison is continued. Default: a new one
            under `runs/`.
        quiet: show nothing meanwhile.
        overrides: as for `recipe`, for both: `budget="5min"`.

    Returns:
        Scores of each seed, the mean difference B − A with its 95% interval, and the seeds it would take to settle it;
        what has been done of it when Ctrl-C stops it.

    Raises:
        UserError: the two cannot be compared, a configuration or the data cannot be used, or the directory is another
            comparison's.
    """
    from rich.console import Console

    from cramjax.config import RunConfig
    from cramjax.recipes import differing_fields, override, recipe_path
    from cramjax.scaling.compare.display import ComparisonDisplay
    from cramjax.scaling.compare.run import compare as run_pairs

    def resolved(given: "RunConfig | str | Path") -> "RunConfig":
        return override(given, overrides) if isinstance(given, RunConfig) else recipe(given, **overrides)

    config_a = resolved(a)
    unchanged = config_a if b is None else resolved(b)
    config_b = override(unchanged, changes or ())
    names = ["A" if isinstance(a, RunConfig) else recipe_path(a).stem]
    names += names if b is None else ["B" if isinstance(b, RunConfig) else recipe_path(b).stem]
    changed = [f"{key}={value}" for key, (_, value) in differing_fields(unchanged, config_b).items()]
    if changed:
        names[1] += f" with {', '.join(changed)}"
    path = Path(out) if out is not None else Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    display = ComparisonDisplay(None if quiet else Console(stderr=True))
    return run_pairs(config_a, config_b, path, seeds=seeds, names=(names[0], names[1]), display=display)


def fit_scaling(table: Any, method: str = "auto", **options: Any) -> "ScalingFit | PowerLaws":
    """Fit scaling laws to a table of runs.

    Args:
        table: a CSV or Parquet file, or columns in memory: `params`, `tokens`, `loss`, and `flops` if it is not
            6·params·tokens. With a row for each run; for the envelope, several rows along each run.
        method: `parametric` (L = E + A/N^α + B/D^β), `isoflop`, `envelope`, `auto` (parametric, and isoflop where runs
            share budgets), or `power-law` for a table of optima.
        options: names of columns (`params`, `tokens`, `loss`, `flops`, `run`) and settings (`solver`, `intervals`,
            `delta`, `samples`, `seed`) of `cramjax.scaling.fit_runs`; for `power-law`, those of
            `cramjax.scaling.fit_power_laws`: `x`, `y`, `std`, `by`.

    Raises:
        ConfigError: the table cannot be read, lacks a column or has too few rows, or an option does not exist.
    """
    from cramjax.scaling import fit_table

    return fit_table(table, method, **options)


def advise(
    fit: "ScalingFit",
    budget: str,
    base: "RunConfig | str | Path",
    *,
    device: str | None = None,
    devices: int = 1,
    tuned_at: str | None = None,
) -> "Recommendation":
    """Say what to train for a budget, by a fit; its `config` is for `train`. Nothing is trained.

    Args:
        fit: from `fit_scaling`.
        budget: a time, tokens or FLOPs.
        base: the family of models, with hyperparameters that are right for `tuned_at`: from `recipe`, or its name.
        device: as of `plan`. Default: the device there is, for a time budget.
        devices: how many of them.
        tuned_at: the budget that the base's batch and decay are right for. Default: the base's own.

    Raises:
        ConfigError: a budget of steps; no shape of the family has the size advised; nothing fits the device.
    """
    from cramjax.config import RunConfig
    from cramjax.scaling.advice.recommendation import recommend

    config = base if isinstance(base, RunConfig) else recipe(base)
    return recommend(fit, config, budget, device=device, devices=devices, tuned_at=tuned_at)


def sweep(
    sweep: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    engine: Literal["local", "ray", "slurm"] = "local",
    jobs: int | None = None,
    address: str | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> "Sweep":
    """Run every trial of a sweep that is not done yet; its `table` is for `fit_scaling`.

    Args:
        sweep: the name of a sweep, the path of its YAML file, or what would stand in it, as a mapping: a base recipe
            and axes (`cramjax sweep --help`).
        out: its directory. Default: `sweeps/NAME`; a mapping has no name.
        engine: where trials run: processes on this machine, tasks of Ray, or an array job of Slurm.
        jobs: trials at the same time. Default: all there is room for.
        address: of a Ray cluster. Default: a Ray on this machine.
        cpus: of each trial, with Ray or Slurm.
        gpus: of each trial, with Ray or Slurm.
        quiet: show nothing meanwhile.
        overrides: fields that differ in every trial, as for `recipe`.

    Raises:
        ConfigError: the sweep or an option cannot be, or the directory holds another sweep.
    """
    from cramjax.errors import ConfigError
    from cramjax.recipes import sweep_path
    from cramjax.scaling.sweep.display import make_display
    from cramjax.scaling.sweep.run import run_sweep

    if isinstance(sweep, Mapping):
        if out is None:
            raise ConfigError("a sweep given as a mapping has no name: give its directory as out.")
        sweep_name = ""
    else:
        sweep_name = sweep_path(sweep).stem
    path = Path(out) if out is not None else Path("sweeps") / sweep_name
    options = {"engine": engine, "jobs": jobs, "address": address, "cpus": cpus, "gpus": gpus}
    return run_sweep(sweep, path, overrides=overrides, display=make_display(path, quiet=quiet), **options)


import_jax_quietly()
