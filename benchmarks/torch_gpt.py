"""The PyTorch contenders: the transformers of `budget_quality.py` and `gpu.py`, and the training of the former.

Those of `budget_quality.py` are GPT-2 style models trained for a number of seconds.
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
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cramjax.config import RunConfig


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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A transformer of pre-norm blocks; what is optional is as nanoGPT has it."""

    layers: int
    heads: int
    width: int
    mlp: int
    """Width of the feed-forward layer, of each half where it is gated."""
    block: int
    """Tokens per sequence."""
    vocab: int
    causal: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu2", "geglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_weight: bool = True
    norm_bias: bool = False
    norm_eps: float = 1e-5
    bias: bool = False
    """Of the linear layers."""
    positions: Literal["learned", "rotary", "sinusoidal"] = "learned"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    embedding_norm: bool = False
    tied: bool = True
    """Whether the head is the token embedding."""
    softcap: float | None = None
    """Squashes the logits into ±softcap."""
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the residual stream, which autocast leaves in float32."""


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each after a norm and added to the stream."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.architecture, width = architecture, architecture.width
        gated, bias = architecture.activation == "geglu", architecture.bias
        self.norm1, self.norm2 = _norm(architecture), _norm(architecture)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, architecture.mlp * (2 if gated else 1), bias=bias)
        self.down = nn.Linear(architecture.mlp, width, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, seq, width = x.shape
        heads, eps = self.architecture.heads, self.architecture.norm_eps
        q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if self.architecture.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], eps=eps) for y in (q, k))
        if rotary is not None:
            q, k = (_rotate(y, *rotary) for y in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.architecture.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
        return x + self.down(self._activated(self.up(self.norm2(x))))

    def _activated(self, h: Tensor) -> Tensor:
        match self.architecture.activation:
            case "relu2":
                return F.relu(h).square()
            case "geglu":
                gate, h = h.chunk(2, dim=-1)
                return F.gelu(gate) * h
            case "gelu_tanh":
                return F.gelu(h, approximate="tanh")
            case "gelu":
                return F.gelu(h)


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a final norm, and a head."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.architecture, width, block = architecture, architecture.width, architecture.block
        self.tokens = nn.Embedding(architecture.vocab, width)
        match architecture.positions:
            case "learned":
                self.positions = nn.Embedding(block, width)
            case "sinusoidal":
                self.scale = nn.Parameter(torch.tensor(width**-0.5))
                turns = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
                angles = torch.arange(block)[:, None] * turns
                waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
                self.register_buffer("sinusoids", waves, persistent=False)
            case "rotary":
                turns = torch.arange(0, width // architecture.heads, 2) / (width // architecture.heads)
                angles = torch.arange(block)[:, None] * architecture.rope_base**-turns
                self.register_buffer("cosines", angles.cos(), persistent=False)
                self.register_buffer("sines", angles.sin(), persistent=False)
        self.embedding_norm = _norm(architecture) if architecture.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(architecture.layers))
        self.norm = _norm(architecture)
        self.head = None if architecture.tied else nn.Linear(width, architecture.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * architecture.layers) if residual else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor, where: Tensor | None = None) -> Tensor:
        """Sum of the negative log-likelihoods of the targets (nats); targets of -1 are not counted.

        Args:
            inputs: tokens (batch, seq).
            targets: tokens to predict, shaped as `where`, or else as the inputs.
            where: positions of the predictions in each row. Default: all.
        """
        architecture, rotary, length = self.architecture, None, inputs.shape[1]
        x = self.tokens(inputs)
        match architecture.positions:
            case "learned":
                x = x + self.positions.weight[:length]
            case "sinusoidal":
                x = x + self.scale * self.sinusoids[:length]
            case "rotary":
                rotary = self.cosines[:length], self.sines[:length]
        x = self.embedding_norm(x).to(getattr(torch, architecture.stream_dtype))
        for block in self.blocks:
            x = block(x, rotary)
        if where is not None:
            x = x.gather(1, where[:, :, None].expand(-1, -1, x.shape[-1]))
        logits = F.linear(self.norm(x), self.tokens.weight if self.head is None else self.head.weight).float()
        if architecture.softcap is not None:
            logits = architecture.softcap * torch.tanh(logits / architecture.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def gpt(contender: Contender, vocab: int) -> Transformer:
    """The model of a contender."""
    layers, heads, width = contender.layers, contender.heads, contender.width
    return Transformer(Architecture(layers, heads, width, mlp=4 * width, block=contender.block, vocab=vocab))


def architecture_of(config: RunConfig, stream_dtype: str) -> Architecture:
    """The model that a run of CramJAX trains.

    Raises:
        ValueError: it has something that this one lacks.
    """
    model = config.model
    plain = {
        "kv_heads": None,
        "head_dim": None,
        "window": None,
        "mask_documents": False,
        "norm_position": "pre",
        "token_types": 0,
        "final_norm": True,
        "head_transform": False,
        "head_bias": False,
        "adaptive_head": (),
        "embedding_skip": False,
        "value_embeddings": False,
        "bigram_buckets": 0,
        "dropout": 0.0,
    }
    lacking = {name: getattr(model, name) for name, value in plain.items() if getattr(model, name) != value}
    if model.activation not in get_args(get_type_hints(Architecture)["activation"]):
        lacking["activation"] = model.activation
    if lacking:
        raise ValueError(f"this transformer has none of {lacking}")
    return Architecture(
        layers=model.layers,
        heads=model.heads,
        width=model.width,
        mlp=model.mlp,
        block=config.data.sequence_length,
        vocab=-(-config.tokenizer.vocab_size // model.vocab_multiple) * model.vocab_multiple,
        causal=config.objective.kind == "causal",
        activation=model.activation,  # pyright: ignore[reportArgumentType]
        norm=model.norm,
        norm_weight=model.norm_affine,
        norm_bias=model.norm_affine,
        norm_eps=model.norm_eps,
        bias=model.bias,
        positions=model.positions,  # pyright: ignore[reportArgumentType]
        rope_base=model.rope_base,
        qk_norm=model.qk_norm,
        embedding_norm=model.embedding_norm,
        tied=model.tied,
        softcap=model.logit_softcap,
        stream_dtype=stream_dtype,  # pyright: ignore[reportArgumentType]
    )


def mask_tokens(tokens: Tensor, rate: float, mask_id: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hide random positions of each row as BERT does: 80% behind the mask, 10% behind a random token, 10% not at all.

    Returns:
        The tokens with masks (batch, seq), the positions (batch, round(rate · seq)), and what was there.
    """
    where = torch.rand(tokens.shape, device=tokens.device).topk(round(rate * tokens.shape[1]), dim=1).indices
    targets, kind = tokens.gather(1, where), torch.rand(where.shape, device=tokens.device)
    shown = torch.where(kind < 0.9, torch.randint_like(targets, vocab), targets)
    return tokens.scatter(1, where, torch.where(kind < 0.8, mask_id, shown)), where, targets


def _norm(architecture: Architecture) -> nn.Module:
    options = {"eps": architecture.norm_eps, "elementwise_affine": architecture.norm_weight}
    if architecture.norm == "rmsnorm":
        return nn.RMSNorm(architecture.width, **options)
    return nn.LayerNorm(architecture.width, bias=architecture.norm_bias, **options)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + head_dim / 2]) by their angles."""
    (first, second), cosines, sines = x.chunk(2, dim=-1), cosines.to(x.dtype), sines.to(x.dtype)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


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
    model = gpt(contender, corpus.vocab)
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
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
