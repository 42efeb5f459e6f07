"""Experts: what a layer of them costs over the feed-forward layer that computes as much for a token.

Forward, and forward with all gradients, of tokens that a router sends to one expert each: by every implementation of
the grouped product, router and sorting included, in turns with the dense layer. `--run` says instead how busy the
experts of a trained model are on held-out text.

    python benchmarks/experts.py [--rows 4096] [--dtype float32] [--quick] [--json PATH]
    python benchmarks/experts.py --run runs/moe-mini [--json PATH]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cramjax.data import prepared_already
from cramjax.kernels.activation import activate
from cramjax.kernels.dense import dense
from cramjax.kernels.grouped import arrange, arrange_within, combine, dispatch, grouped, rows_of_block
from cramjax.model.loads import expert_loads
from cramjax.training import load_run

WIDTH, INNER = 192, 512
CAPACITY = 1.25
NUMBERS = (8, 64)


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="Tokens: as many as gpt-mini's batch has.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--run", default=None, help="A run whose experts' loads are wanted.")
    parser.add_argument("--quick", action="store_true", help="Check the script, not the claim.")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 256, 2
    found = loads(args.run) if args.run else ratios(args.rows, args.dtype, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ratios(rows: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Times of all layers, over the dense layer's of the same turn."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (rows, WIDTH), dtype)
    layers = {"dense": (dense_layer(dtype), weights(key, ()))}
    for number in NUMBERS:
        for name in ("loop", "scan", "batched", "ragged"):
            layers[f"{number} experts, {name}"] = experts_layer(dtype, number, name), weights(key, (number,))
    ways = {name: (*compiled(layer), own) for name, (layer, own) in layers.items()}
    for forward, both, own in ways.values():  # compiled before anything is timed
        jax.block_until_ready((forward(own, x), both(own, x)))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, (forward, both, own) in ways.items():
            if "ragged" in name and turn >= max(2, repeats // 10):  # it takes very long
                continue
            seconds[name].append((timed(forward, own, x), timed(both, own, x)))
    result: dict[str, Any] = {"rows": rows, "dtype": dtype, "width": WIDTH, "inner": INNER, "layers": {}}
    base = [statistics.median(each) for each in zip(*seconds["dense"], strict=True)]
    print(f"{rows} tokens, SwiGLU {WIDTH} to {INNER}, one expert active, {dtype}: forward, forward and backward")
    for name, times in seconds.items():
        own = [statistics.median(each) for each in zip(*times, strict=True)]
        over = [a / b for a, b in zip(own, base, strict=True)]
        result["layers"][name] = {"seconds": own, "over_dense": over}
        print(f"{name:22} {own[0] * 1e3:8.1f} {own[1] * 1e3:8.1f} ms, {over[0]:5.2f} {over[1]:5.2f} times", flush=True)
    return result


def weights(key: Any, lead: tuple[int, ...]) -> dict[str, Any]:
    """Matrices of a layer, or of so many experts and their router."""
    made = {
        "up": jax.random.normal(key, (*lead, WIDTH, 2 * INNER)) / WIDTH**0.5,
        "down": jax.random.normal(key, (*lead, INNER, WIDTH)) / INNER**0.5,
    }
    return made | ({"router": jax.random.normal(key, (WIDTH, *lead)) / WIDTH**0.5} if lead else {})


def dense_layer(dtype: str) -> Callable[..., Any]:
    """The feed-forward layer."""
    return lambda own, x: dense(activate("swiglu", dense(x, own["up"], dtype=dtype)), own["down"], dtype=dtype)


def experts_layer(dtype: str, number: int, name: str) -> Callable[..., Any]:
    """Experts, one of which is active, by an implementation; by the batched one with a capacity, which drops tokens."""

    def layer(own: dict[str, Any], x: Any) -> Any:
        logits = jnp.dot(x.astype(jnp.float32), own["router"], precision="highest")
        gates, chosen = jax.lax.top_k(jax.nn.sigmoid(logits), 1)
        if name == "batched":
            made = arrange_within(chosen, number, int(CAPACITY * len(x)) // number)
        else:
            made = arrange(chosen, number, 1 if name == "ragged" else rows_of_block("cpu", len(x), number))
        options = {"dtype": dtype, "implementation": name}
        h = activate("swiglu", grouped(dispatch(x, made), own["up"], made.groups, **options))
        return combine(grouped(h, own["down"], made.groups, **options), gates, made)

    return layer


def compiled(layer: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A layer's forward pass, and both passes with all gradients."""

    def loss(own: Any, x: Any) -> Any:
        return jnp.sum(jnp.square(layer(own, x).astype(jnp.float32)))

    return jax.jit(layer), jax.jit(jax.grad(loss, argnums=(0, 1)))


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call."""
    before = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - before


def loads(path: str, most: int = 65536) -> dict[str, Any]:
    """How busy the experts of a run are on its held-out text."""
    run = load_run(path)
    model, config = run.language_model, run.config
    prepared = prepared_already(config.data, config.tokenizer)
    assert prepared is not None, "the data of the run is prepared"
    length = config.data.sequence_length
    held = jnp.asarray(prepared.validation.tokens[: most // length * length].astype("int32"))
    each = expert_loads(model.model, model.params, held[: len(held) // length * length].reshape(-1, length))
    print(f"{len(held)} held-out tokens: tokens of the busiest and of the idlest expert over the mean, by block")
    for block, own in enumerate(each):
        print(f"{block:3} {float(own.max()):.3f} {float(own.min()):.3f}")
    return {"tokens": len(held), "loads": [[float(x) for x in own] for own in each]}


if __name__ == "__main__":
    main()
