"""What do fewer bits, or zeros, cost in bits per byte? Each method on one model directory, on the same texts.

The gap is the bits per byte of held-out text after less before, and shares are of the gap of rounding to nearest on the
same grid (of magnitude pruning with as many zeros). AWQ and rotations come before rounding, HQQ in its place. Bits per
parameter are of the whole model's files, everything counted. With several seeds, what is calibrated on (and rotations)
is drawn anew: means, and the half width of a 95% interval (Student's t). What draws nothing runs once.

    python benchmarks/compress.py MODEL --data TEXT --text HELD_OUT [--seeds 1] [--only gptq] [--json PATH] [--quick]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
from scipy.stats import t

from cramjax.compress import compress_model, read_model
from cramjax.compression import CompressConfig
from cramjax.devices import describe
from cramjax.evaluation import evaluate_text
from cramjax.loading import from_mapping

GRIDS: dict[str, dict[str, Any]] = {"per channel": {"group": None}, "groups of 64": {}}
QUANTISED = [
    (f"{bits} bits, {grid}", f"{method} {bits} {grid}", {"method": method, "bits": bits, **options})
    for bits in (8, 4, 3, 2)
    for grid, options in GRIDS.items()
    for method in ("rtn", "gptq")
]
FLOATS = [
    (name, f"{method} {name}", {"method": method, **options})
    for name, options in {
        "nf4": {"bits": "nf4"},
        "fp8": {"bits": "fp8"},
        "fp8 per channel": {"bits": "fp8", "group": None},
        "mxfp4": {"bits": "mxfp4"},
    }.items()
    for method in ("rtn", "gptq")
]
# What makes rounding to nearest, or GPTQ, lose less, on its grid.
PREPARED = [
    (f"{bits} bits, {grid}", f"{name} {bits} {grid}", {"bits": bits, **own, **options})
    for bits in (4, 3)
    for grid, options in GRIDS.items()
    for name, own in {
        "rtn awq": {"method": "rtn", "awq": True},
        "gptq awq": {"method": "gptq", "awq": True},
        "rtn rotate": {"method": "rtn", "rotate": True},
        "gptq rotate": {"method": "gptq", "rotate": True},
    }.items()
]
REFINED = [
    (f"{bits} bits asymmetric", f"{name} {bits} groups of 64", {"bits": bits, "symmetric": False, **own})
    for bits in (4, 3, 2)
    for name, own in {
        "rtn asymmetric": {"method": "rtn"},
        "rtn asymmetric mse": {"method": "rtn", "mse": True},
        "hqq": {"method": "hqq"},
        "gptq asymmetric": {"method": "gptq"},
    }.items()
]
PRUNED = [
    (name, f"{method} {name}", {"method": method, **options})
    for name, options in {
        "half": {"sparsity": 0.5},
        "2:4": {"pattern": "2:4"},
        "4:8": {"pattern": "4:8"},
        "half, 4 bits": {"sparsity": 0.5, "bits": 4},
    }.items()
    for method in ("magnitude", "wanda", "sparsegpt")
]
SHARED = [
    (name, f"{method} {name}{', owl' if own else ''}", {"method": method, "sparsity": share, **own})
    for name, share in (("half", 0.5), ("70%", 0.7))
    for method in ("magnitude", "wanda", "sparsegpt")
    for own in ({}, {"shares": "owl"})
    if (method != "magnitude" if own else name != "half")  # these are above
]


def draws(options: dict[str, Any]) -> bool:
    """Whether anything depends on the seed: the text that is calibrated on, or a rotation."""
    prepared = options.get("awq") or options.get("rotate")
    return options["method"] not in ("rtn", "hqq", "magnitude") or bool(prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=[], help="run what has one of these words in its name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two sequences, one setting of each method")
    arguments = parser.parse_args()
    model = read_model(arguments.model)
    before = evaluate_text(model, arguments.text).bits_per_byte
    device = describe(jax.local_devices()[0])
    print(f"{device}\n{arguments.model}: {before:.4f} bits per byte of {arguments.text}", flush=True)
    settings = [*QUANTISED, *FLOATS, *REFINED, *PREPARED, *PRUNED, *SHARED]
    if arguments.quick:
        settings = [QUANTISED[4], QUANTISED[5], FLOATS[0], REFINED[2], *PREPARED[:3], *PRUNED[3:6]]
    print("| | bits per parameter | gap (bits per byte) | share | seconds |\n| --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    against: dict[str, float] = {}
    for peer, name, options in settings:
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        gaps, seconds, bits = [], [], 0.0
        for seed in range(arguments.seeds if draws(options) else 1):
            own = {"data": arguments.data, "sequences": 2 if arguments.quick else arguments.sequences, "seed": seed}
            config = from_mapping(CompressConfig, {**own, "sequence_length": arguments.length, **options})
            with tempfile.TemporaryDirectory() as directory:
                made = compress_model(model, config, Path(directory) / "model")
                gaps.append(evaluate_text(made.out, arguments.text).bits_per_byte - before)
            seconds.append(made.seconds)
            bits = made.total.bits
        gap = statistics.fmean(gaps)
        if not draws(options):
            against.setdefault(peer, gap)
        share = gap / against[peer] if peer in against else None
        within = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        rows.append({"name": name, "bits": bits, "gaps": gaps, "share": share, "seconds": seconds, **options})
        shown = f"{gap:.4f}" + ("" if within is None else f" ± {within:.4f}")
        percent = "" if share is None else f"{share:.0%}"
        print(f"| {name} | {bits:.2f} | {shown} | {percent} | {statistics.fmean(seconds):.0f} |", flush=True)
    if arguments.json:
        content = {"device": device, "model": str(arguments.model), "before": before, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
