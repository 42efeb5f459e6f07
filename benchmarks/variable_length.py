"""Texts of any lengths: what buffers without padding, and batches found by dynamic programming, are worth.

Encoder: BERT-base's shape with random weights, texts of lengths U[0.2, 1] of 128 and of 512 (evenly spaced, in random
order), each way of batching in turn, float32 or as `--dtype` says; the fastest of `--rounds`, after one that compiles.
  padded: batches of 16 as they come, each row as long as the longest text may be (ByteTransformer's baseline);
  to the longest: the same batches, each row as long as the batch's longest, in eights;
  unpadded: the same weights and the same program's code, in the batches that `cramjax.serve.lengths` makes.
Where the extra `parity` is there, also transformers' BertModel in PyTorch, padded, with the same weights and threads.
FLOPs are those of products, counted by hand and in the programs (one block's, times layers); what the streams differ by
is the greatest difference over all real tokens.

Scheduler: MiniLM's shape, lengths U[2, 100], a queue of `--queue` requests that are all there (a server that is
saturated); requests per second, compiled before. Each request alone; naive batches (as they come, padded to the
longest, at most 32); dynamic programming over the measured table, padded and unpadded. The table is measured here.
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data.tokenizer import make_tokenizer
from cramjax.language_model import LanguageModel
from cramjax.model import Model, make_model
from cramjax.model.ragged import Ragged, ragged
from cramjax.serve.lengths import Costs, Programs, batches, ragged_of
from cramjax.serve.lengths.costs import estimated_costs, measure
from cramjax.serve.lengths.shapes import Shape

_ENCODER: dict[str, Any] = {
    "activation": "gelu",
    "norm_position": "post",
    "norm_eps": 1e-12,
    "bias": True,
    "positions": "learned",
    "token_types": 2,
    "embedding_norm": True,
    "final_norm": False,
}
BERT_BASE = ModelConfig(layers=12, width=768, heads=12, mlp=3072, **_ENCODER)
MINILM = ModelConfig(layers=6, width=384, heads=12, mlp=1536, **_ENCODER)
_VOCAB, _BATCH, _NAIVE = 30522, 16, 32

Texts = list[list[int]]


@dataclass(frozen=True)
class Way:
    """A way to batch texts."""

    name: str
    made: list[tuple[tuple[int, ...], Ragged]]
    """Numbers of the texts of each batch, and its buffer."""


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--texts", type=int, nargs=2, default=(96, 24), help="Of length 128, and of 512.")
    parser.add_argument("--queue", type=int, default=400, help="Requests to schedule.")
    parser.add_argument("--quick", action="store_true", help="Two layers, few texts: checks the script, not the claim.")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.texts, args.queue = 1, (16, 16), 40
    results: dict[str, Any] = {"settings": {**vars(args), "json": None}, "jax": jax.__version__}
    results["encoder"] = {most: encoder(most, count, args) for most, count in zip((128, 512), args.texts, strict=True)}
    results["scheduler"] = scheduler(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def built(config: ModelConfig, dtype: Any, quick: bool) -> LanguageModel:
    """A model with random weights, all of which matter."""
    config = replace(config, layers=2) if quick else config
    model = make_model(config, vocab_size=_VOCAB, sequence_length=512, causal=False, compute_dtype=dtype)
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    return LanguageModel(Path("random"), "encoder", tokenizer, 512, model, model.init(jax.random.key(0)))


def evenly(least: int, most: int, count: int) -> Texts:
    """Random texts whose lengths are evenly spaced, in random order: their mean is that of the distribution."""
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.linspace(least, most, count).round().astype(int))
    return [rng.integers(1, _VOCAB, length).tolist() for length in lengths]


def as_they_come(texts: Texts, size: int, longest: int | None) -> list[tuple[tuple[int, ...], Ragged]]:
    """Padded batches in the order of the texts, as long as said, or as the longest of a batch, in eights."""
    made = []
    for start in range(0, len(texts), size):
        numbers = tuple(range(start, min(start + size, len(texts))))
        own = [texts[number] for number in numbers]
        most = longest or -(-max(map(len, own)) // 8) * 8
        made.append((numbers, ragged(own, places=len(own) * most, rows=len(own), longest=most)))
    return made


def scheduled(texts: Texts, costs: Costs, *, padded: bool = False) -> list[tuple[tuple[int, ...], Ragged]]:
    """The batches of `cramjax.serve.lengths`, all of whose programs are compiled before."""
    costs = PaddedCosts(**vars(costs)) if padded else costs
    found = batches([len(text) for text in texts], costs, Programs(compiling=0.0))
    if padded:
        found = [batch._replace(shape=batch.shape._replace(places=batch.shape.padded)) for batch in found]
    return [(batch.texts, ragged_of(batch, texts)) for batch in found]


@dataclass(frozen=True)
class PaddedCosts(Costs):
    """Of batches that are padded."""

    def of_shape(self, shape: Shape) -> Any:
        """Seconds, with a token in every place."""
        return super().of_shape(shape._replace(places=shape.padded))


@partial(jax.jit, static_argnums=0)
def walk(model: Model, params: Any, texts: Ragged) -> jax.Array:
    """What is timed: the stream after the last block."""
    return model.unpadded(params, texts)


def fastest(ways: Sequence[Way], compute: Callable[[Ragged], jax.Array], rounds: int) -> dict[str, float]:
    """Seconds of each way, the ways in turn."""
    spent: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(1 + rounds):
        for way in ways:
            began = time.perf_counter()
            for _, buffer in way.made:
                jax.block_until_ready(compute(buffer))
            if turn:
                spent[way.name].append(time.perf_counter() - began)
    return {name: min(each) for name, each in spent.items()}


def encoder(most: int, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Padded and unpadded, of lengths U[0.2, 1] times `most`."""
    model, texts = built(BERT_BASE, args.dtype, args.quick), evenly(round(0.2 * most), most, count)
    costs = replace(estimated_costs(model), context=most)
    ways = [
        Way("padded", as_they_come(texts, _BATCH, most)),
        Way("to the longest", as_they_come(texts, _BATCH, None)),
        Way("unpadded", scheduled(texts, costs)),
    ]
    seconds = fastest(ways, lambda buffer: walk(model.model, model.params, buffer), args.rounds)
    streams = {way.name: streams_of(model, way, texts) for way in ways}
    difference = max(np.abs(a - b).max() for a, b in zip(streams["padded"], streams["unpadded"], strict=True))
    counted = {way.name: sum(products_by_hand(model, buffer) for _, buffer in way.made) for way in ways}
    programs = {way.name: sum(products_of_program(model, buffer) for _, buffer in way.made) for way in ways}
    found: dict[str, Any] = {"texts": count, "mean_share": float(np.mean([len(text) for text in texts]) / most)}
    found["seconds"], found["difference"] = seconds, float(difference)
    found["flops"] = {name: value / counted["padded"] for name, value in counted.items()}
    if max(abs(programs[name] / value - 1) for name, value in counted.items()) > 1e-6:
        raise SystemExit(f"FLOPs by hand {counted} are not those of the programs {programs}")
    found["seconds_ratio"] = {name: value / seconds["padded"] for name, value in seconds.items()}
    found["pytorch_seconds"] = torch_seconds(model, texts, most, args.rounds)
    found["batches"] = [[len(t.tokens), len(t.starts), t.longest] for _, t in ways[-1].made]
    print(f"lengths U[{0.2 * most:.0f}, {most}], {count} texts, {args.dtype}")
    for name in seconds:
        print(
            f"  {name:15} {seconds[name]:8.3f} s, {found['seconds_ratio'][name]:.3f} of padded; "
            f"FLOPs {found['flops'][name]:.3f} of padded"
        )
    if found["pytorch_seconds"]:
        print(f"  {'PyTorch, padded':15} {found['pytorch_seconds']:8.3f} s")
    print(f"  greatest difference of streams {difference:.1e}", flush=True)
    return found


def streams_of(model: LanguageModel, way: Way, texts: Texts) -> list[np.ndarray]:
    """The stream of each text."""
    found: list[Any] = [None] * len(texts)
    for numbers, buffer in way.made:
        stream = np.asarray(walk(model.model, model.params, buffer), np.float32)
        for number, start in zip(numbers, np.asarray(buffer.starts), strict=False):
            found[number] = stream[start : start + len(texts[number])]
    return found


def products_by_hand(model: LanguageModel, buffer: Ragged) -> float:
    """FLOPs of all products of a batch."""
    config = model.config
    per_place = 2 * config.layers * config.width * (4 * config.width + 2 * config.mlp)
    pairs = len(buffer.starts) * buffer.longest**2
    return float(per_place * len(buffer.tokens) + 4 * config.layers * config.width * pairs)


def products_of_program(model: LanguageModel, buffer: Ragged) -> float:
    """FLOPs of all products of a batch by its program, whose only products are those of one block, in a scan."""
    return _dot_flops(walk.lower(model.model, model.params, buffer).as_text()) * model.config.layers


def _dot_flops(text: str) -> float:
    """FLOPs of the products of a program in StableHLO, each operation counted once."""
    total, shape = 0.0, r"tensor<([\dx]+)x\w+>"
    dot = rf"stablehlo\.dot_general.*?contracting_dims = \[([\d, ]*)\] x .*?: \({shape}, .*?-> {shape}"
    for dims, left, out in re.findall(dot, text):
        inner = np.prod([int(left.split("x")[int(dim)]) for dim in dims.split(",")])
        total += 2.0 * inner * np.prod([int(size) for size in out.split("x")])
    return total


def torch_seconds(model: LanguageModel, texts: Texts, most: int, rounds: int) -> float | None:
    """Seconds of transformers' BertModel on padded batches of 16, random weights of the same shape."""
    try:
        import torch
        from transformers import BertConfig, BertModel
    except ImportError:
        return None
    config = model.config
    their = BertModel(
        BertConfig(
            vocab_size=_VOCAB,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp,
        ),
        add_pooling_layer=False,
    ).eval()
    spent = []
    with torch.inference_mode():
        for _ in range(1 + rounds):
            began = time.perf_counter()
            for start in range(0, len(texts), _BATCH):
                own = texts[start : start + _BATCH]
                ids, mask = np.zeros((2, len(own), most), np.int64)
                for row, there, text in zip(ids, mask, own, strict=True):
                    row[: len(text)], there[: len(text)] = text, 1
                their(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            spent.append(time.perf_counter() - began)
    del their
    gc.collect()
    return min(spent[1:])


def scheduler(args: argparse.Namespace) -> dict[str, Any]:
    """Requests per second of ways to batch a queue."""
    model, rng = built(MINILM, args.dtype, args.quick), np.random.default_rng(1)
    texts = [rng.integers(1, _VOCAB, length).tolist() for length in rng.integers(2, 101, args.queue)]
    began = time.perf_counter()
    costs = replace(estimated_costs(model), table=measure(model))
    measuring = time.perf_counter() - began
    ways = [
        Way("each alone", as_they_come(texts, 1, None)),
        Way("naive batches", as_they_come(texts, _NAIVE, None)),
        Way("scheduled, padded", scheduled(texts, costs, padded=True)),
        Way("scheduled, unpadded", scheduled(texts, costs)),
    ]
    seconds = fastest(ways, lambda buffer: walk(model.model, model.params, buffer), args.rounds)
    print(f"a queue of {args.queue} requests, lengths U[2, 100]; the table took {measuring:.1f} s to measure")
    for way in ways:
        ratio = seconds["naive batches"] / seconds[way.name]
        print(
            f"  {way.name:20} {args.queue / seconds[way.name]:8.1f} requests/s, {ratio:.2f} times naive batches, "
            f"{len(way.made)} batches",
            flush=True,
        )
    return {
        "seconds": seconds,
        "measuring": measuring,
        "table": vars(costs.table),
        "queue": args.queue,
        "batches": {way.name: len(way.made) for way in ways},
    }


if __name__ == "__main__":
    main()
