"""Configurations that cannot be are refused with the value got, the values allowed and the next step."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from cramjax.config import LayerConfig, ModelConfig, RopeScaling, RunConfig
from cramjax.errors import ConfigError
from cramjax.loading import range_of
from cramjax.recipes import load_recipe
from cramjax.validation import validate


def test_defaults_are_valid():
    validate(RunConfig())


_WHOLE = RunConfig(model=ModelConfig(rope_scaling=RopeScaling("yarn", 2.0), pattern=(LayerConfig(),)))
"""With every group of fields that may be left out."""


def test_every_number_has_a_range():
    numbers = [(cls, name) for cls, name, hint in _hints(RunConfig) if hint in (int, float, int | None, float | None)]
    assert numbers == []  # the types of numbers with ranges are others
    ranged = [name for _, name, hint in _hints(RunConfig) if range_of(hint) is not None]
    assert {"layers", "lr", "dropout", "seed", "limit_bytes", "factor"} <= set(ranged)


def _hints(cls: Any) -> Iterator[tuple[type, str, Any]]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for inner in get_args(hint) or (hint,):
            if is_dataclass(inner):
                yield from _hints(inner)
        yield cls, name, hint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.size=0", "batch.size must be at least 1, got 0."),
        ("model.layers=-1", "model.layers must be at least 1, got -1."),
        ("optim.lr=0", "optim.lr must be above 0, got 0."),
        ("optim.lr=.nan", "optim.lr must be above 0, got nan."),
        ("optim.lr=.inf", "optim.lr must be above 0, got inf."),
        ("optim.beta2=1", "optim.beta2 must be from 0 to below 1, got 1."),
        ("optim.decay=1.5", "optim.decay must be from 0 to 1, got 1.5."),
        ("data.validation_fraction=1", "data.validation_fraction must be between 0 and 1, got 1."),
        ("objective.mask_rate=0", "objective.mask_rate must be between 0 and 1, got 0."),
        ("model.dropout=-0.1", "model.dropout must be from 0 to below 1, got -0.1."),
        ("seed=-1", "seed must be at least 0"),
    ],
)
def test_numbers_out_of_range(override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("quickstart", ["budget=300"], "budget '300' has no unit"),
        ("quickstart", ["model.width=100", "model.heads=3"], "allowed heads are 1, 2, 4, 5, 10, 20, 25, 50, 100"),
        ("quickstart", ["model.heads=4", "model.kv_heads=3"], "got 3 for 4 heads: allowed are 1, 2, 4."),
        ("quickstart", ["model.mup_base_head_dim=32"], "model.mup_base_width is not given, without which"),
        ("quickstart", ["model.mup_base_width=64", "optim.name=sophia"], "works with optim.name=adamw, muon, lion"),
        ("gpt-mini", ["model.mup_base_width=64"], "excludes model.adaptive_head, got [1024, 4096]"),
        ("quickstart", ["model.head_dim=33"], "rotary positions need an even head width, got 33"),
        ("quickstart", ["model.positions=sinusoidal", "model.width=129", "model.heads=1"], "even model.width, got 129"),
        ("quickstart", ["model.max_positions=64"], "at least data.sequence_length (128), got 64"),
        ("quickstart", ["data.context=64"], "data.context must be at least data.sequence_length (128), got 64"),
        ("gpt-mini", ["model.positions=learned", "data.context=256"], "data.context must be at most 128"),
        ("tune-chat", ["train.freeze=[embed/*]"], "but with an adapter all of the model's own weights stay"),
        ("quickstart", ["batch.size=100", "batch.microbatch=32"], "must divide batch.size, got 32 for a batch of 100"),
        ("quickstart", ["batch.ramp=0.5"], "give a smaller batch.microbatch, or batch.ramp=0"),
        ("quickstart", ["train.fsdp=3"], "batch.microbatch must be a multiple of the devices"),
        (
            "quickstart",
            ["train.offload_optimizer=true", "optim.name=muon"],
            "train.offload_optimizer works with optim.name=adamw only, got muon",
        ),
        (
            "quickstart",
            ["train.offload_optimizer=true", "optim.name=adamw", "optim.ema=0.9"],
            "optim.ema must be 0 with train.offload_optimizer, got 0.9",
        ),
        (
            "quickstart",
            ["train.offload_optimizer=true", "optim.name=adamw", "train.zero=1"],
            "train.zero must be 3 with train.offload_optimizer, got 1",
        ),
        ("quickstart", ["train.delay_update=0.1"], "train.delay_update is 0.1, but train.offload_optimizer is false"),
        ("quickstart", ["objective.mask_rate_end=0.1"], "set objective.kind=masked, or leave it out"),
        ("crammed-bert-mini", ["objective.mask_rate=0.001"], "at least one position of data.sequence_length=128"),
        ("crammed-bert-mini", ["model.bigram_buckets=64"], "model.bigram_buckets must be 0 for objective.kind=masked"),
        ("crammed-bert-mini", ["evaluate.samples=[hello]"], "[MASK] for objective.kind=masked, got 'hello'"),
        ("moe-mini", ["model.experts.active=9"], "at most model.experts.number, which is 8, got 9"),
        ("moe-mini", ["model.experts.active=5"], "mlp is 768, which the 5 experts of a token (active and"),
        ("moe-mini", ["model.experts.every=4"], "every is 4, and with model.layers=3 and the pattern given no block"),
        ("moe-mini", ["model.pattern=[{experts: false}]"], "and the pattern given no block has experts: lower it"),
        ("moe-mini", ["model.bias=true"], "model.bias is true, and experts have no biases"),
        ("moe-mini", ["model.mup_base_width=64", "model.adaptive_head=[]"], "µP has no rule here for the router"),
        ("moe-mini", ["model.experts.normalised=true"], "would always be 1, and the router learn nothing"),
        ("moe-mini", ["model.experts.balance_loss=0.1"], "balance_loss is 0.1, but balance is bias, and only loss has"),
        ("moe-mini", ["optim.name=sophia"], "optim.name is sophia, which differentiates the loss twice"),
        ("quickstart", ["tokenizer.vocab_size=200"], "at least 258 for kind bpe, got 200"),
        ("quickstart", ["tokenizer.kind=file"], "tokenizer.path must name a tokenizer.json"),
        ("quickstart", ["tokenizer.path=x.json"], "set tokenizer.kind=file, or leave the path out"),
        ("quickstart", ["model.adaptive_head=[9,3]"], "must be growing token ids such as [1024, 4096], got [9, 3]"),
        ("gpt-124m", ["model.adaptive_head=[9]"], "needs model.tied=false and model.head_bias=false"),
        ("gpt-124m", ["optim.head_lr=0.1"], "set optim.embed_lr, or model.tied=false"),
        ("quickstart", ["optim.warmup=0.6"], "optim.warmup + optim.decay must be at most 1"),
        ("quickstart", ["optim.decay=0"], "optim.decay must be above 0 for the wsd schedule, got 0"),
        ("quickstart", ["optim.schedule=one_cycle"], "must be above 0, got 0"),
        ("quickstart", ["optim.name=schedule_free_adamw", "optim.ema=0.9"], "must be 0 for schedule_free_adamw"),
        ("quickstart", ["data.source=[]"], "data.source must name at least one source of text, got []"),
        ("quickstart", ["data.source="], "data.source must name at least one source of text, got ''"),
        ("quickstart", ["data.source=hub:"], "must name a data set after `hub:`"),
        ("quickstart", ["data.hub_config=en"], "give `hub:NAME` as the source, or leave data.hub_config out"),
        ("quickstart", ["data.document_separator="], "data.document_separator must not be empty"),
        ("quickstart", ["optim.name=adalomo", "batch.microbatch=8"], "adalomo cannot accumulate"),
        ("quickstart", ["optim.name=lomo", "batch.microbatch=8", "batch.ramp=0.5"], "lomo cannot accumulate"),
        ("quickstart", ["optim.name=lomo", "optim.ema=0.9"], "another copy of the weights"),
        ("quickstart", ["optim.name=adalomo", "train.layer_loop=unroll"], "in a loop, to update them in place"),
        ("quickstart", ["optim.name=adalomo", "train.offload_optimizer=true"], "optim.name=adamw only, got adalomo"),
        ("quickstart", ["train.param_dtype=bfloat16", "optim.name=adamw"], "small updates of adamw would be lost"),
    ],
)  # fmt: skip
def test_impossible_combinations(recipe: str, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.width=100", "model.heads=3", "model.head_dim=32"],
        ["model.heads=4", "model.kv_heads=2"],
        ["tokenizer.kind=bytes", "tokenizer.vocab_size=1"],
        ["tokenizer.kind=file", "tokenizer.path=x.json"],
        ["batch.size=96", "batch.microbatch=32", "batch.ramp=0.5"],
        ["optim.schedule=one_cycle", "optim.warmup=0.3"],
        ["data.source=hub:allenai/c4", "data.hub_config=en"],
        ["optim.embed_lr=0"],
    ],
)
def test_possible_combinations(overrides: list[str]):
    load_recipe("quickstart", overrides)
