"""What LOMO's and AdaLomo's steps hold, compiled for GPUs: one layer's gradients, and the parameters once."""

import dataclasses
import re

import jax
import pytest

from cramjax.config import RunConfig
from cramjax.planning import Compiled, compile_for, compile_step, missing
from cramjax.recipes import load_recipe
from cramjax.training.parts import Vocabulary, build_model

_GIB = 2**30
_7B = load_recipe("llama-7b")

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("batch", "limit"), [(1, 14), (16, 22)], ids=["16GB", "24GB"])
def test_all_of_llama_7b_trains_on_one_small_card(batch: int, limit: float) -> None:
    config = dataclasses.replace(_7B, batch=dataclasses.replace(_7B.batch, size=batch))
    compiled = compile_step(config, "rtx-4090")
    print(f"batch {batch}: {compiled.device_bytes / _GIB:.2f} GiB, {compiled.temporaries / _GIB:.2f} temporary")
    assert compiled.device_bytes <= limit * _GIB
    # Weights in bfloat16, and next to nothing beside them: all of it is updated where it lies.
    assert compiled.arguments == pytest.approx(2 * 6.74e9, rel=2e-3)
    assert compiled.outputs - compiled.aliases < 2**20
    # Of the stacked matrices there is no copy, in no precision.
    assert not re.search(r"f32\[32,(4096|11008),\d+\]", compiled.text)
    assert not re.search(r"= bf16\[32,(4096|11008),\d+\]\S* copy\(", compiled.text)


@needs_compiler
@pytest.mark.slow
def test_lomo_whose_norm_is_bounded_holds_no_more() -> None:
    config = load_recipe("llama-7b", ["--optim.name=lomo", "--optim.clip=1.0", "--batch.size=1"])
    assert compile_step(config, "rtx-4090").device_bytes <= 14 * _GIB


@needs_compiler
@pytest.mark.slow
def test_llama_7b_with_adamw_does_not_fit_80_gb() -> None:
    config = load_recipe("llama-7b", ["--optim.name=adamw", "--train.param_dtype=float32", "--batch.size=1"])
    compiled = compile_step(config, "a100-80gb")
    print(f"AdamW: {compiled.device_bytes / _GIB:.1f} GiB")
    assert compiled.device_bytes > 80 * _GIB


@needs_compiler
@pytest.mark.slow
def test_low_precision_is_drawn_without_a_copy_in_float32() -> None:
    model = build_model(_7B, Vocabulary(32000, separator_id=0, mask_id=None))
    compiled = compile_for("rtx-4090", model.init, jax.eval_shape(lambda: jax.random.key(0)))
    print(f"init: {compiled.outputs / _GIB:.2f} GiB, {compiled.temporaries / _GIB:.2f} temporary")
    assert compiled.outputs == pytest.approx(2 * 6.74e9, rel=2e-3)
    assert compiled.temporaries < 0.5 * _GIB


_WIDTH, _MLP, _VOCAB, _LENGTH = 2048, 8192, 32000, 128


def _small(layers: int, *overrides: str) -> RunConfig:
    sizes = {"layers": layers, "width": _WIDTH, "mlp": _MLP, "heads": 16}
    shape = [f"--model.{name}={size}" for name, size in sizes.items()]
    return load_recipe("llama-7b", [*shape, f"--data.sequence_length={_LENGTH}", "--batch.size=1", *overrides])


def _beside_inputs(compiled: Compiled, layers: int) -> int:
    """Temporaries without the stored inputs of the blocks, which full rematerialisation keeps."""
    return compiled.temporaries - layers * _LENGTH * _WIDTH * 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_gradients_take_the_memory_of_one_block_and_the_larger_end_whatever_the_depth(name: str, tied: str) -> None:
    overrides = (f"--optim.name={name}", f"--model.tied={tied}", "--optim.clip=1.0")
    held = {layers: _beside_inputs(compile_step(_small(layers, *overrides), "rtx-4090"), layers) for layers in (4, 32)}
    print({layers: f"{size / 2**20:.1f} MiB" for layers, size in held.items()})
    block, end = 4 * _WIDTH**2 + 3 * _WIDTH * _MLP, _VOCAB * _WIDTH
    # Gradients in float32, and nothing as large as one more of them. Some depths hold less: the compiler may put off
    # the head's gradient until the blocks' are gone. Under one bound for all depths no matrix's gradient is kept of
    # each layer: those of 32 layers, even of the smallest matrix, are more than what the bound leaves free.
    assert max(held.values()) <= 4 * (block + end)
    assert 32 * 4 * _WIDTH**2 > 4 * (block + end) - min(held.values())
