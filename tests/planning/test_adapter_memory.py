"""Steps that train an adapter, compiled for GPUs: what QLoRA fits on a small card."""

import pytest

from cramjax.planning import compile_step, missing
from cramjax.recipes import load_recipe

_GIB = 2**30

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "weights", "limit"), [("qlora-7b", 6.74e9, 10), ("qlora-13b", 13.0e9, 16)])
def test_qlora_trains_large_models_on_one_small_card(recipe: str, weights: float, limit: float) -> None:
    config = load_recipe(recipe, ["--batch.size=1"])
    assert config.adapter is not None and config.adapter.rank == 64 and config.data.sequence_length == 512
    compiled = compile_step(config, "rtx-4090")
    print(f"{recipe}: {compiled.device_bytes / _GIB:.2f} GiB, {compiled.temporaries / _GIB:.2f} temporary")
    assert compiled.device_bytes <= limit * _GIB
    # The base in 4.127 bits a weight (block 64, double quantisation), embedding and head in 16, and 12 bytes (itself
    # and two moments) for each number of the adapter: nothing else is held.
    model = config.model
    assert model.mlp is not None
    ends = 2 * config.tokenizer.vocab_size * model.width
    low_rank = model.layers * 64 * (4 * (model.width + model.width) + 3 * (model.width + model.mlp))
    held = (weights - ends) * 4.127 / 8 + 2 * ends + 12 * low_rank
    assert abs(compiled.arguments / held - 1) < 0.01
    assert compiled.outputs - compiled.aliases < 2**20
    # No matrix of the base is unpacked for all layers at once.
    assert f"f32[{config.model.layers},{config.model.width},{config.model.mlp}]" not in compiled.text
