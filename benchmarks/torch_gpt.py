"""The PyTorch contenders of `budget_quality.py`: GPT-2 style models trained for a number of seconds.

`nanogpt` is nanoGPT's documented CPU configuration, written from its published hyperparameters. `gpt-192` and
`gpt-128` are the best we found of that architecture at five minutes on two cores: fewer layers, BPE tokens, a higher
rate, a schedule over the time spent, compiled, in float32 or bfloat16, whichever is faster here. Start-up, compilation
and the final evaluation are not counted as time; every validation token is scored once.

    python benchmarks/torch_gpt.py nanogpt --train FILE --validation FILE [--seconds 300] [--json PATH]
"""

import argparse
import dataclasses
import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Contender:
    """A GPT-2 style model and how it is trained."""

    layers: int
    heads: int
    width: int
    block: int
    """Tokens per sequence."""
    batch: int
    """Sequences per step."""
    vocab: int | None
    """BPE vocabulary; None: the characters of the training text."""
    lr: float
    schedule: Literal["cosine", "linear"]
    """cosine: to a tenth of the peak; linear: flat, then over the last 60% of the time to zero."""
    warmup_steps: int = 100
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    compiled: bool = False
    dtype: Literal["float32", "bfloat16", "fastest"] = "float32"


CONTENDERS = {
    "nanogpt": Contender(4, 4, 128, block=64, batch=12, vocab=None, lr=1e-3, schedule="cosine"),
    "gpt-128": Contender(
        3, 4, 128, block=128, batch=16, vocab=2048, lr=6e-3, schedule="linear", compiled=True, dtype="fastest"
    ),
    "gpt-192": Contender(
        3, 3, 192, block=64, batch=32, vocab=4096, lr=4e-3, schedule="linear", compiled=True, dtype="fastest"
    ),
}


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a final LayerNorm, and a head tied to the token embedding."""

    def __init__(self, contender: Contender, vocab: int):
        super().__init__()
        width = contender.width
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(contender.block, width)
        self.blocks = nn.ModuleList(Block(width, contender.heads) for _ in range(contender.layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * contender.layers) if residual else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of the targets (nats); targets of -1 are not counted."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


class Corpus(NamedTuple):
    """Training and validation tokens, and the bytes that the latter stand for."""

    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    vocab: int
    unscored_nats: float
    """Cost of the first validation token, which no model predicts: a uniform guess, or 0 if it is a separator."""


def read_corpus(train: Path, validation: Path, vocab: int | None) -> Corpus:
    """Tokenize two text files, by character or with the BPE that CramJAX trains on the first of them."""
    if vocab is None:
        texts = [_read_text(path) for path in (train, validation)]
        characters = sorted(set("".join(texts)))
        table = {character: index for index, character in enumerate(characters)}
        streams = [np.array([table[character] for character in text], np.int64) for text in texts]
        return Corpus(*streams, len(texts[1].encode()), len(characters), math.log(len(characters)))
    from cramjax.config import DataConfig, TokenizerConfig
    from cramjax.data import prepare

    prepared = prepare(DataConfig(source=str(train), validation=str(validation)), TokenizerConfig(vocab_size=vocab))
    streams = [np.array(file.tokens, np.int64) for file in (prepared.train, prepared.validation)]
    return Corpus(*streams, prepared.validation.text_bytes, prepared.tokenizer.vocab_size, 0.0)


def run(contender: Contender, corpus: Corpus, seconds: float, seed: int = 0) -> dict[str, float | int | str]:
    """Train for so many seconds and score the whole validation text.

    Args:
        contender: model and hyperparameters.
        corpus: tokens.
        seconds: time for steps; preparing, compiling and the evaluation at the end do not count.
        seed: of initialisation and batches.
    """
    started = time.perf_counter()
    dtypes = ["float32", "bfloat16"] if contender.dtype == "fastest" else [contender.dtype]
    rates = {dtype: _steps_per_second(contender, corpus, dtype, seed) for dtype in dtypes}
    dtype = max(rates, key=rates.__getitem__)
    model, step = _trainer(contender, corpus, dtype, seed)
    batches = np.random.default_rng(seed)
    step(0, 0.0, batches)  # the last of what is compiled lazily; the step's rate is zero
    preparation = time.perf_counter() - started

    started, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        steps += 1
        step(steps, spent / seconds, batches)
    spent = time.perf_counter() - started
    tokens = steps * contender.batch * contender.block
    nats, count = evaluate(model, corpus, contender.block)
    return {
        "bits_per_byte": (nats + corpus.unscored_nats) / math.log(2) / corpus.validation_bytes,
        "loss": nats / count,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": tokens,
        "steps": steps,
        "tokens_per_second": tokens / spent,
        "seconds": spent,
        "uncharged_seconds": preparation,
        "dtype": dtype,
    }


def evaluate(model: nn.Module, corpus: Corpus, block: int) -> tuple[float, int]:
    """Sum of nats over the validation tokens after the first, each predicted once, and how many they are."""
    tokens, rows, batch = corpus.validation, math.ceil((len(corpus.validation) - 1) / block), 256
    padded = np.full(rows * block + 1, -1, np.int64)
    padded[: len(tokens)] = tokens
    inputs, targets = padded[:-1].reshape(rows, block), padded[1:].reshape(rows, block)
    total = 0.0
    with torch.no_grad():
        for start in range(0, rows, batch):
            part = slice(start, start + batch)
            total += float(model(torch.from_numpy(inputs[part].clip(0)), torch.from_numpy(targets[part].copy())))
    return total, len(tokens) - 1


def learning_rate(contender: Contender, step: int, fraction: float) -> float:
    """The rate of a step, from the steps so far (warm-up) and the share of the time spent (decay)."""
    warm = min(1.0, step / contender.warmup_steps)
    if contender.schedule == "cosine":
        return contender.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * fraction)))
    return contender.lr * warm * min(1.0, (1 - fraction) / 0.6)


Step = Callable[[int, float, np.random.Generator], None]


def _trainer(contender: Contender, corpus: Corpus, dtype: str, seed: int) -> tuple[nn.Module, Step]:
    """A new model, and the function that trains it by one step."""
    torch.manual_seed(seed)
    model = GPT(contender, corpus.vocab)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": contender.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=contender.lr, betas=(0.9, contender.beta2), fused=True)
    forward = torch.compile(model) if contender.compiled else model
    offsets = np.arange(contender.block + 1)

    def step(number: int, fraction: float, batches: np.random.Generator) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(contender, number, fraction)
        starts = batches.integers(0, len(corpus.train) - contender.block, contender.batch)
        rows = torch.from_numpy(corpus.train[starts[:, None] + offsets])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        (loss / (contender.batch * contender.block)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), contender.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def _steps_per_second(contender: Contender, corpus: Corpus, dtype: str, seed: int, steps: int = 20) -> float:
    _, step = _trainer(contender, corpus, dtype, seed)
    batches = np.random.default_rng(seed)
    for number in range(5):
        step(number, 0.0, batches)
    started = time.perf_counter()
    for number in range(steps):
        step(number, 0.0, batches)
    return steps / (time.perf_counter() - started)


def _read_text(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def main() -> None:
    """Train one contender and print its score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--train", type=Path, required=True, help="training text (.txt or .txt.gz)")
    parser.add_argument("--validation", type=Path, required=True, help="validation text (.txt or .txt.gz)")
    parser.add_argument("--seconds", type=float, default=300.0, help="training time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--lr", type=float, default=None, help="another peak rate, to tune it")
    parser.add_argument("--threads", type=int, default=None, help="threads (default: PyTorch's own choice)")
    parser.add_argument("--json", type=Path, default=None, help="write the result here too")
    args = parser.parse_args()
    from cramjax.devices import keep_freed_memory

    keep_freed_memory()  # what CramJAX gives itself; it helps PyTorch too
    if args.threads:
        torch.set_num_threads(args.threads)
    contender = CONTENDERS[args.contender]
    if args.lr is not None:
        contender = dataclasses.replace(contender, lr=args.lr)
    corpus = read_corpus(args.train, args.validation, contender.vocab)
    seconds = 20.0 if args.quick else args.seconds
    result = {"name": args.contender, **dataclasses.asdict(contender), **run(contender, corpus, seconds)}
    print(f"{args.contender}: {result['bits_per_byte']:.4f} bits per byte, {result['tokens_per_second']:,.0f} tokens/s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
