"""The bytes that a training step moves outside its products and attention, compiled for a GPU that need not be there.

A step compiled ahead of time is text. This counts, over all its kernels, ours included, the bytes read and written (see
`hlo_traffic.py` for what counts), and lists what a fast step has none of: kernels that only convert, slice, copy,
concatenate or take a tanh of activations, and products with a float32 result that is no weight's gradient. The loop
over microbatches counts for one of them. Layers are walked as the recipe says; to know what each costs, give
--train.layer_loop. Needs the extra `aot`; half a minute a recipe.

    python benchmarks/step_bytes.py                     # gpt-124m and crammed-bert as below, with their limits
    python benchmarks/step_bytes.py gpt-1.3b --device=a100-80gb --batch.microbatch=4
    python benchmarks/step_bytes.py --json step_bytes.json --largest=40
"""

import argparse
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from hlo_traffic import Kernel, Shape, Traffic, traffic

from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.planning import compile_step
from cramjax.planning.steps import vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.training.parts import build_model

CASES = {
    "gpt-124m": ("--optim.name=adamw", "--batch.size=16", "--batch.microbatch=16"),
    "crammed-bert": ("--batch.size=512", "--batch.microbatch=512", "--batch.ramp=0"),
}
"""The recipes that are counted without a name, and how: one microbatch a step."""
LIMITS = {"gpt-124m": 24e9, "crammed-bert": 75e9}
"""Bytes outside products and attention that they may move."""
APART = ("products", "attention")


@dataclass(frozen=True)
class Sizes:
    """What tells the arrays of a step apart by their shapes."""

    tokens: int
    """Of a microbatch."""
    width: int
    vocab: int
    """Rows of the embedding, padding included."""
    weights: frozenset[int]
    """Elements of every weight, of one layer's, and of the parts that are fused side by side."""

    def is_logits(self, shape: Shape) -> bool:
        """Whether an array holds a score of each token of the vocabulary, for some rows."""
        return self.vocab in shape.dims and shape.elements > self.vocab and shape.elements not in self.weights

    def is_activation(self, shape: Shape) -> bool:
        """Whether an array is as large as the residual stream, and has a microbatch's tokens among its dimensions."""
        if shape.elements < self.tokens * self.width:
            return False
        return self.is_logits(shape) or self.tokens in _runs(shape.dims)


@dataclass(frozen=True)
class Row:
    """Kernels that differ in their layer only."""

    gigabytes: float
    """Of all runs of all of them."""
    runs: int
    kind: str
    kernel: str
    shapes: str
    op_name: str


@dataclass(frozen=True)
class Breach:
    """Kernels that break one rule, and differ in their layer only."""

    rule: str
    kernels: Row


@dataclass(frozen=True)
class Report:
    """A step's bytes."""

    gigabytes: float
    """Read and written outside products and attention."""
    kinds: dict[str, float]
    """The same by kind of kernel, in gigabytes, largest first."""
    runs: dict[str, int]
    """Kernels launched, by kind; products and attention too."""
    products: dict[str, int]
    """Products, by the type and shape of their results."""
    product_gigabytes: float
    attention_gigabytes: float
    breaches: tuple[Breach, ...]
    float32_logits: tuple[Row, ...]
    """Products whose float32 results are logits: to be argued for."""
    endless: tuple[str, ...]
    """Loops counted for one turn."""
    largest: tuple[Row, ...]


def sizes_of(config: RunConfig) -> Sizes:
    """The sizes of a configuration's step."""
    model = build_model(config, vocabulary_of(config))
    declared = jax.tree.leaves_with_path(model.weights)
    weights: set[int] = set()
    vocab = 0
    for path, weight in declared:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        whole = Shape("f32", weight.stacked_shape)
        layer = whole.elements // (weight.repeats or 1)
        weights |= {whole.elements, layer}
        columns = weight.widths
        # A product may give the gradient of one part, or of neighbours.
        parts = (sum(columns[i:j]) for i, j in itertools.combinations(range(len(columns) + 1), 2))
        weights |= {layer // weight.shape[-1] * width for width in parts}
        if name == "embed/token/table":
            vocab = weight.shape[0]
    tokens = (config.batch.microbatch or config.batch.size) * config.data.sequence_length
    return Sizes(tokens, config.model.width, vocab, frozenset(weights))


def report(step: Traffic, sizes: Sizes, largest: int = 20) -> Report:
    """Count a step's bytes by kind and check it against the rules.

    Args:
        step: its kernels.
        sizes: of its arrays.
        largest: how many kernels outside products and attention are listed.
    """
    outside = [kernel for kernel in step.kernels if kernel.kind not in APART]
    size: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for kernel in step.kernels:
        size[kernel.kind] += kernel.bytes
        runs[kernel.kind] += kernel.times
        if kernel.kind == "products":
            products[_shapes(kernel.results)] += kernel.times
    gigabytes = {kind: total / 1e9 for kind, total in size.most_common()}
    product, attention = (gigabytes.pop(kind, 0.0) for kind in APART)
    float32 = [kernel for kernel in step.kernels if kernel.kind == "products" and _float32(kernel, sizes)]
    logits = [kernel for kernel in float32 if any(map(sizes.is_logits, kernel.results))]
    wasteful = [k for k in outside if k.only and any(map(sizes.is_activation, (*k.operands, *k.results)))]
    rules = {"a product with a float32 result that is no weight's gradient": [k for k in float32 if k not in logits]}
    for kernel in wasteful:
        rules.setdefault(f"a kernel that only {kernel.only} activations", []).append(kernel)
    return Report(
        gigabytes=sum(gigabytes.values()),
        kinds=gigabytes,
        runs=dict(runs.most_common()),
        products=dict(products.most_common()),
        product_gigabytes=product,
        attention_gigabytes=attention,
        breaches=tuple(Breach(rule, row) for rule, kernels in rules.items() for row in _rows(kernels)),
        float32_logits=_rows(logits),
        endless=step.endless,
        largest=_rows(outside)[:largest],
    )


def _float32(product: Kernel, sizes: Sizes) -> bool:
    """Whether a product outside the optimizer has a float32 result that is no weight's gradient."""
    if product.of_optimizer:
        return False
    results = [shape for shape in product.results if shape.dtype == "f32"]
    return any(sizes.is_activation(shape) or shape.elements not in sizes.weights for shape in results)


def _runs(dims: Sequence[int]) -> set[int]:
    """The products of all dimensions that lie next to each other."""
    found: set[int] = set()
    for start in range(len(dims)):
        found |= set(itertools.accumulate(dims[start:], operator.mul))
    return found


def _rows(kernels: Iterable[Kernel]) -> tuple[Row, ...]:
    """Kernels gathered over the layers, those that move most first."""
    size: Counter[tuple[str, str, str, str]] = Counter()
    runs: Counter[tuple[str, str, str, str]] = Counter()
    for kernel in kernels:
        name = re.sub(r"[.\d]+$", "", kernel.name)
        shapes = f"{_shapes(kernel.operands)} -> {_shapes(kernel.results)}"
        key = kernel.kind, name, shapes, re.sub(r"layer_\d+", "layer_*", kernel.op_name)
        size[key] += kernel.bytes
        runs[key] += kernel.times
    return tuple(Row(total / 1e9, runs[key], *key) for key, total in size.most_common())


def _shapes(shapes: Iterable[Shape]) -> str:
    """Shapes in words, a repeated one once; scalars left out where there is more."""
    counted = Counter(map(str, shapes))
    arrays = {text: count for text, count in counted.items() if not text.endswith("[]")} or counted
    return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in arrays.items())


def show(name: str, device: str, result: Report) -> None:
    """Print a report."""
    print(f"\n{name} on {device}, jax {jax.__version__}: GB read and written by kernels, and how many run")
    for kind, gigabytes in result.kinds.items():
        print(f"  {gigabytes:7.2f}  {result.runs[kind]:5}  {kind}")
    runs = sum(result.runs[kind] for kind in result.kinds)
    print(f"  {result.gigabytes:7.2f}  {runs:5}  outside products and attention")
    print(f"  {result.attention_gigabytes:7.2f}  {result.runs.get('attention', 0):5}  attention")
    print(f"  {result.product_gigabytes:7.2f}  {result.runs.get('products', 0):5}  products, with results:")
    for shapes, count in result.products.items():
        print(f"           {count:5}    {shapes}")
    for loop in result.endless:
        print(f"Counted for one turn: the loop {loop}")
    print("Largest:")
    for row in result.largest:
        _print(row)
    for row in result.float32_logits:
        print("Logits in float32:")
        _print(row)
    print("Broken rules:" if result.breaches else "Broken rules: none")
    rule = None
    for breach in result.breaches:
        if breach.rule != rule:
            rule = breach.rule
            print(f" {rule}")
        _print(breach.kernels)


def _print(row: Row) -> None:
    print(f"  {row.gigabytes:7.2f}  {row.runs:5}  {row.kernel}: {row.shapes}  ({row.op_name})")


def measure(name: str, overrides: Sequence[str], device: str, largest: int = 20) -> Report:
    """Compile a recipe's step for a device and count.

    Args:
        name: a recipe.
        overrides: of its fields, as on the command line.
        device: a card, as `cramjax plan --device` takes it.
        largest: how many kernels are listed.

    Raises:
        ConfigError: the recipe, a field or the device is not known, or this machine cannot compile for GPUs.
    """
    config = load_recipe(name, list(overrides))
    return report(traffic(compile_step(config, device).text), sizes_of(config), largest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # so that no field of a recipe is taken for one of these
    )
    parser.add_argument("recipe", nargs="?", help=f"default: {' and '.join(CASES)}, with the fields that CASES gives")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--largest", type=int, default=20, help="how many kernels are listed")
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")  # only compiles
    cases = CASES if arguments.recipe is None else {arguments.recipe: ()}
    results: dict[str, Any] = {}
    for name, fields in cases.items():
        try:
            result = measure(name, [*fields, *overrides], arguments.device, arguments.largest)
        except ConfigError as error:
            parser.error(str(error))
        show(name, arguments.device, result)
        if arguments.recipe is None:
            over = result.gigabytes - LIMITS[name] / 1e9
            print(f"Limit: {LIMITS[name] / 1e9:.0f} GB, {'kept' if over <= 0 else f'broken by {over:.1f}'}")
        results[name] = asdict(result)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": arguments.device, "jax": jax.__version__, "steps": results}), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
