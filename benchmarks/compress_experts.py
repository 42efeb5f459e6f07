"""What does QMoE's ternary code cost a model of experts, and what does it save? Each way on one trained model.

The experts alone are compressed: rounded to ternary values, by GPTQ to them (with levels that are means, or extremes),
and by GPTQ to 2 bits. Bits are of the experts' parameters, with levels, states and tables counted, and of QMoE's
dictionary beside them; bits per byte are of held-out windows, with 95% intervals by bootstrap, of the difference to
rounding too, window by window. What is stored is read again and compared with the ternary values, one by one.

    python benchmarks/compress_experts.py MODEL --data TEXT --text HELD_OUT [--sequences 128] [--json PATH] [--quick]
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax import generate
from cramjax.compress import compress_model, read_model
from cramjax.compression import CompressConfig
from cramjax.devices import describe
from cramjax.evaluation.bootstrap import Measure
from cramjax.formats.table import flatten
from cramjax.formats.ternary import ternary_outputs
from cramjax.kernels.coding import entropy
from cramjax.kernels.packed import Coded, is_packed, read_coded
from cramjax.language_model import LanguageModel, load_model
from cramjax.training.given import language_model

ONLY = "*experts/[!s]*"
WAYS: dict[str, dict[str, Any]] = {
    "RTN ternary, means": {"method": "rtn", "bits": "ternary", "levels": "means"},
    "RTN ternary, extremes": {"method": "rtn", "bits": "ternary", "levels": "extremes"},
    "GPTQ ternary, means": {"method": "gptq", "bits": "ternary", "levels": "means", "damp": 0.1},
    "GPTQ ternary, extremes": {"method": "gptq", "bits": "ternary", "levels": "extremes", "damp": 0.1},
    "GPTQ 2 bits": {"method": "gptq", "bits": 2, "group": 64},
}
# Of independent values: share of zeros, and bits of a value in words of QMoE's dictionary, rows of 768.
TABLE = ((0.84, 0.87, 0.885, 0.90, 0.92), (0.931, 0.800, 0.745, 0.699, 0.648))


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run or a model directory with experts")
    parser.add_argument("--data", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None, help="most held-out windows (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="eight sequences, eight windows")
    args = parser.parse_args()
    if args.quick:
        args.sequences, args.windows = 8, 8
    model = language_model(read_model(args.model))
    windows = held_out(model, args.text, args.windows)
    print(f"{describe(jax.local_devices()[0])}: {args.model}, {len(windows[0])} windows of {args.text}")
    rows: dict[str, dict[str, Any]] = {"float": judged(model, windows, None)}
    reference: Measure | None = None
    show("float", rows["float"])
    for name, options in WAYS.items():
        config = CompressConfig(data=args.data, sequences=args.sequences, only=ONLY, **options)
        with tempfile.TemporaryDirectory() as directory:
            made = compress_model(model, config, Path(directory) / "model")
            own = load_model(made.out)
            rows[name] = {"compressing_seconds": made.seconds, **judged(own, windows, reference), **bits(own)}
        reference = reference or rows[name]["measure"]
        show(name, rows[name])
    if args.json:
        content = {name: {key: value for key, value in row.items() if key != "measure"} for name, row in rows.items()}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def held_out(model: LanguageModel, text: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Windows of tokens (windows, length + 1), and the bytes of the text that each predicts."""
    length = min(model.context, 512)
    opened = gzip.open if text.endswith(".gz") else open
    with opened(text, "rt", encoding="utf-8") as file:
        tokens = np.asarray(model.tokenizer.encode_batch([file.read()])[0], np.int32)
    count = min(len(tokens) // (length + 1), most or len(tokens))
    windows = tokens[: count * (length + 1)].reshape(count, length + 1)
    texts = [len(model.tokenizer.decode(window[1:].tolist()).encode()) for window in windows]
    return windows, np.asarray(texts, float)


def judged(model: LanguageModel, windows: tuple[np.ndarray, np.ndarray], against: Measure | None) -> dict[str, Any]:
    """Bits per byte of each window, its interval, and that of the difference; and seconds of generation."""
    score = jax.jit(lambda params, window: _bits_of(model, params, window))
    losses = np.asarray([float(score(model.params, window)) for window in windows[0]])
    measure = Measure("bits per byte", losses, windows[1], higher_is_better=False)
    found: dict[str, Any] = {"measure": measure, "bits_per_byte": measure.value, "interval": measure.interval(0)}
    if against is not None:
        found["difference"], found["difference_interval"] = against.difference(measure, 0)
    str(generate(model, "The", max_tokens=32, temperature=0))  # compiles
    began = time.perf_counter()
    str(generate(model, "The", max_tokens=32, temperature=0))
    return {**found, "generation_seconds": time.perf_counter() - began}


def _bits_of(model: LanguageModel, params: Any, window: Any) -> Any:
    """Of the tokens after the first."""
    stream = model.model.hidden(params, window[None, :-1])
    chances = jax.nn.log_softmax(model.model.logits(params, stream)[0].astype(jnp.float32))
    return -chances[jnp.arange(len(window) - 1), window[1:]].sum() / np.log(2)


def bits(model: LanguageModel) -> dict[str, Any]:
    """What the experts' matrices take for each parameter, in the file and in memory, and whether it is what it says."""
    leaves = [(name, leaf) for name, leaf in flatten(model.params) if is_packed(leaf)]
    count = sum(int(np.prod(leaf.shape)) for _, leaf in leaves)
    if not all(isinstance(leaf, Coded) for _, leaf in leaves):
        return {"bits": 8 * sum(leaf.bytes for _, leaf in leaves) / count, "parameters": count}
    values = [read_coded(leaf) for _, leaf in leaves]
    zeros = sum(int((each == 0).sum()) for each in values) / count
    stored = 8 * sum(output.bytes for _, leaf in leaves for output in ternary_outputs("", leaf)) / count
    coded, exact = [], True
    for (_, leaf), each in zip(leaves, values, strict=True):
        levels = np.asarray(leaf.levels, np.float32)
        own = np.where(each == 1, levels[..., :1, :], np.where(each == 2, levels[..., 1:, :], 0))
        exact &= bool((np.asarray(leaf.unpacked(), np.float32) == own).all())
        columns = np.moveaxis(each, -2, -1).reshape(-1, each.shape[-2])
        coded.append(entropy.encode(columns))
        exact &= bool((entropy.decode(coded[-1], *columns.shape) == columns).all())
    words = sum(16 * int(np.asarray(leaf.starts)[..., -1].sum()) for _, leaf in leaves) / count
    return {
        "bits": stored,
        "parameters": count,
        "zeros": zeros,
        "entropy": entropy.entropy(zeros),
        "entropy_code": sum(each.bits for each in coded) / count,
        "dictionary": words,
        "dictionary_of_table": float(np.interp(zeros, *TABLE)),
        "exact": exact,
    }


def show(name: str, row: dict[str, Any]) -> None:
    """Print one way."""
    low, high = row["interval"] or (np.nan, np.nan)
    said = f"{name:24} {row['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}] bits a byte"
    if row.get("difference_interval"):
        low, high = row["difference_interval"]
        said += f", {row['difference']:+.4f} [{low:+.4f}, {high:+.4f}] against rounding"
    if "bits" in row:
        said += f"; {row['bits']:.4f} bits a parameter of {row['parameters']:,}"
    if "zeros" in row:
        said += (
            f"; {row['zeros']:.1%} zeros; entropy {row['entropy']:.4f}, code {row['entropy_code']:.4f} "
            f"({row['entropy_code'] / row['entropy'] - 1:+.1%}); dictionary {row['dictionary']:.4f} (table "
            f"{row['dictionary_of_table']:.3f}); {'exact' if row['exact'] else 'NOT EXACT'}"
        )
    print(f"{said}; {row['generation_seconds']:.2f} s for 32 tokens", flush=True)


if __name__ == "__main__":
    main()
