"""Plans of tuning on labels, whose head is no decoder of tokens."""

import pytest

from cramjax.gpus import GPUS
from cramjax.planning import estimate_memory, missing
from cramjax.planning.plan import plan
from cramjax.recipes import load_recipe
from cramjax.training.continuing import continued

_SHAPE = {"labels.source": "texts.jsonl", "model.layers": 4, "model.width": 256, "model.heads": 4, "model.mlp": 1024}

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@pytest.mark.parametrize("target", ["class", "number"])
def test_there_are_no_logits_of_tokens(target: str) -> None:
    config = continued(load_recipe("tune-classify", {**_SHAPE, "labels.target": target, "batch.microbatch": 16}))
    few, many = (
        estimate_memory(config, vocab_size=vocabulary, compute_dtype="bfloat16", gpu=GPUS["rtx-4090"])
        for vocabulary in (1024, 32768)
    )
    assert few.by_kind["logits"] == many.by_kind["logits"] == 0
    # What grows with the vocabulary is the embedding and AdamW's two moments of it: its gradient comes when the
    # activations, which are larger, have gone.
    assert many.device_bytes - few.device_bytes == pytest.approx(12 * 256 * (32768 - 1024), rel=0.01)
    assert many.by_kind["activations"] == few.by_kind["activations"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("device", ["rtx-4090", "a100-40gb"])
def test_a_step_on_labels_takes_what_was_planned(device: str) -> None:
    made = plan("tune-classify", device, exact=True, policies=["none"], **_SHAPE, **{"batch.size": 64})
    assert made.exact_device_bytes is not None
    assert made.chosen.memory.device_bytes == pytest.approx(made.exact_device_bytes, rel=0.1)
