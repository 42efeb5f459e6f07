"""Which ways to tune go with which optimizers and savings of memory: one table, from what configurations are refused.

Nothing is traced or compiled. `table()` is what the documentation shows, and the tests train every cell that it allows.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cramjax.adapters import AdapterConfig
from cramjax.config import BatchConfig, OptimConfig, RunConfig, TrainConfig
from cramjax.errors import ConfigError
from cramjax.recipes import validate

METHODS: Mapping[str, AdapterConfig | None] = {
    "full": None,
    "frozen parts": None,
    "lora": AdapterConfig(rank=2),
    "qlora": AdapterConfig(rank=2, base="nf4"),
    "dora": AdapterConfig(rank=2, dora=True),
    "ia3": AdapterConfig("ia3"),
    "bitfit": AdapterConfig("bitfit"),
    "prompt": AdapterConfig("prompt", virtual_tokens=2),
    "prefix": AdapterConfig("prefix", virtual_tokens=2),
}
"""What is trained; small ranks, for nothing here depends on them."""

OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "adalomo")

SAVINGS: Mapping[str, Mapping[str, Any]] = {
    "accumulation": {"batch.microbatch": 2},
    "remat": {"train.remat": "full"},
    "fsdp of 2": {"train.fsdp": 2},
    "delayed offload": {"train.offload_optimizer": True, "train.delay_update": 0.5},
}


def combination(method: str, optimizer: str, *savings: str, base: RunConfig) -> RunConfig:
    """A run of a method by an optimizer with some savings of memory, which may be one that is refused.

    Args:
        method: one of `METHODS`.
        optimizer: of all parameters.
        savings: of `SAVINGS`.
        base: all else; its batch is of a multiple of 4.
    """
    values: dict[str, Any] = {}
    for name in savings:
        values |= SAVINGS[name]
    microbatch = values.pop("batch.microbatch", base.batch.size)
    freeze = ("embed/*",) if method == "frozen parts" else ()
    train = {key.removeprefix("train."): value for key, value in values.items()}
    return replace(
        base,
        adapter=METHODS[method],
        optim=replace(base.optim, name=optimizer),
        batch=replace(base.batch, microbatch=microbatch),
        train=replace(base.train, freeze=freeze, **train),
    )


def refusal(method: str, optimizer: str, saving: str) -> str | None:
    """Why a combination is refused; None: it trains. Arguments as of `combination`."""
    base = RunConfig(
        start_from="MODEL",
        batch=BatchConfig(size=4),
        optim=OptimConfig(ema=0.0),
        train=TrainConfig(),
    )
    try:
        validate(combination(method, optimizer, saving, base=base))
    except ConfigError as error:
        return str(error)
    return None


def table() -> str:
    """The combinations in Markdown: a line for each method, and the savings that go with each optimizer."""
    lines = [f"| | {' | '.join(OPTIMIZERS)} |", "| --- |" + " --- |" * len(OPTIMIZERS)]
    for method in METHODS:
        cells = []
        for optimizer in OPTIMIZERS:
            allowed = [saving for saving in SAVINGS if refusal(method, optimizer, saving) is None]
            cells.append(", ".join(allowed) or "refused")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
