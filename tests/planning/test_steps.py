"""Whole training steps compiled for GPUs: they hold no scores of all pairs, and of logits one tile, rounded."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.gpus import GPUS
from cramjax.kernels.attention import api
from cramjax.kernels.cross_entropy import CrossEntropySums
from cramjax.kernels.cross_entropy.reference import cross_entropy
from cramjax.model import readout
from cramjax.planning import Compiled, compile_step, missing
from cramjax.recipes import load_recipe

_GPT = load_recipe("gpt-124m", ["--batch.size=16", "--optim.name=adamw"])
# A microbatch that is not as long as a sequence, so that shapes tell them apart.
_BERT = load_recipe("crammed-bert", ["--batch.size=192", "--batch.microbatch=96"])

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _arrays(compiled: Compiled) -> set[tuple[str, tuple[int, ...]]]:
    """Types and shapes of all arrays in a compiled program."""
    found = re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", compiled.text)
    return {(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in found}


def _pairs(compiled: Compiled, length: int) -> set[tuple[int, ...]]:
    return {shape for _, shape in _arrays(compiled) if shape.count(length) > 1}


def _logits(compiled: Compiled, config: RunConfig) -> set[tuple[str, int]]:
    """Types and rows of arrays with a column for each token of the vocabulary, but for the head's weights."""
    vocab = config.tokenizer.vocab_size
    rows = {(dtype, math.prod(shape) // vocab) for dtype, shape in _arrays(compiled) if vocab in shape}
    return {(dtype, count) for dtype, count in rows if count > config.model.width}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "tokens", "target"),
    [
        (_GPT, 16 * 1024, "a100-40gb"),
        (_GPT, 16 * 1024, "rtx-4090"),
        (_BERT, 96 * 32, "rtx-3090"),
        (_BERT, 96 * 32, "h100"),
    ],
    ids=["gpt-124m-a100-40gb", "gpt-124m-rtx-4090", "crammed-bert-rtx-3090", "crammed-bert-h100"],
)
def test_steps_hold_no_scores_and_one_tile_of_rounded_logits(config: RunConfig, tokens: int, target: str) -> None:
    compiled = compile_step(config, target)
    assert all(f"attention_{name}" in compiled.text for name in ("forward", "dq", "dkv"))
    assert not _pairs(compiled, config.data.sequence_length)
    # As many rows as a sixteenth of the card's memory holds, 8192 at least.
    room = max(8192, GPUS[target].memory // 16 // (2 * config.tokenizer.vocab_size))
    assert _logits(compiled, config) == {("bf16", tokens if tokens <= room else tokens // 2)}


def _plain_cross_entropy_sum(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    token_weights: jax.Array | None = None,
    *,
    tied: bool,
    **options: object,
) -> CrossEntropySums:
    """The loss as it is defined, differentiated by JAX."""
    del tied
    each = cross_entropy(hidden, weight, targets, **options)  # pyright: ignore[reportArgumentType]
    weights = 1.0 if token_weights is None else token_weights
    nll, penalty = jnp.sum(each.nll * weights), jnp.sum(each.penalty * weights)
    return CrossEntropySums(nll + penalty, nll, penalty, jnp.sum(each.correct * weights))


@needs_compiler
@pytest.mark.slow
def test_kernels_at_least_halve_the_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = compile_step(_GPT, "rtx-4090")
    monkeypatch.setattr(api, "preference", lambda *_, **__: ("reference",))  # all scores at once, as XLA does them
    monkeypatch.setattr(readout, "cross_entropy_sum", _plain_cross_entropy_sum)
    plain = compile_step(_GPT, "rtx-4090")
    print(f"{fused.device_bytes / 2**30:.2f} GiB with kernels, {plain.device_bytes / 2**30:.2f} GiB without")
    assert fused.device_bytes <= plain.device_bytes / 2


@needs_compiler
@pytest.mark.slow
def test_scores_and_logits_are_found_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "preference", lambda *_, **__: ("reference",))
    monkeypatch.setattr(readout, "cross_entropy_sum", _plain_cross_entropy_sum)
    plain = compile_step(_GPT, "a100-80gb")
    assert _pairs(plain, 1024) and ("f32", 16 * 1024) in _logits(plain, _GPT)


def test_a_vocabulary_of_unknown_size_is_an_error() -> None:
    config = load_recipe("quickstart", ["--tokenizer.kind=file", "--tokenizer.path=tokenizer.json"])
    with pytest.raises(ConfigError, match="tokenizer.kind is file"):
        compile_step(config, "h100")


@needs_compiler
@pytest.mark.slow
def test_policies_need_less_and_offload_moves_it_to_the_host() -> None:
    def compiled(remat: str) -> Compiled:
        return compile_step(load_recipe("gpt-124m", ["--batch.size=16", f"--train.remat={remat}"]), "rtx-4090")

    steps = {remat: compiled(remat) for remat in ("none", "selective", "full", "offload")}
    temporaries = {remat: step.temporaries for remat, step in steps.items()}
    print({remat: (size >> 20, steps[remat].host >> 20) for remat, size in temporaries.items()})
    assert temporaries["none"] > temporaries["selective"] > temporaries["full"] > temporaries["offload"]
    tokens = 12 * 16 * 1024  # of all layers; bfloat16 products of 2304, 768 and 3072, and the stream of 768
    assert temporaries["selective"] - temporaries["full"] == pytest.approx(2 * tokens * (2304 + 768 + 3072), rel=0.1)
    assert steps["offload"].host == pytest.approx(2 * tokens * (2304 + 768 + 3072 + 768), rel=0.02)
    assert all(step.host == 0 for remat, step in steps.items() if remat != "offload")
