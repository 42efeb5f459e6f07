"""The PyTorch contenders of the benchmark score every token once, and follow their published schedule."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")


@pytest.fixture(scope="module")
def contenders():
    path = Path(__file__).parents[2] / "benchmarks" / "torch_gpt.py"
    spec = importlib.util.spec_from_file_location("torch_gpt", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["torch_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [1, 9, 17, 40])
def test_every_validation_token_is_scored_once(contenders, count: int):
    """Against the definition: for each token after the first, the log-softmax given its own block before it."""
    contender = contenders.Contender(1, 2, 16, block=8, batch=2, vocab=None, lr=1e-3, schedule="cosine")
    torch.manual_seed(0)
    model = contenders.GPT(contender, 11)
    tokens = np.random.default_rng(count).integers(0, 11, count + 1)
    corpus = contenders.Corpus(tokens, tokens, count, 11, 0.0)
    nats, scored = contenders.evaluate(model, corpus, contender.block)
    expected = 0.0
    for at in range(1, count + 1):
        start = (at - 1) // 8 * 8
        seen = torch.tensor(tokens[None, start:at])
        only_last = torch.full_like(seen, -1)
        only_last[0, -1] = int(tokens[at])
        expected += model(seen, only_last).item()
    assert scored == count
    assert nats == pytest.approx(expected, rel=1e-5)


def test_nanogpt_follows_its_published_configuration(contenders):
    nano = contenders.CONTENDERS["nanogpt"]
    assert (nano.layers, nano.heads, nano.width, nano.block, nano.batch) == (4, 4, 128, 64, 12)
    rate = contenders.learning_rate
    assert rate(nano, 50, 0.0) == pytest.approx(0.5e-3)  # half of the 100 warm-up steps
    assert rate(nano, 1000, 0.5) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rate(nano, 1000, 1.0) == pytest.approx(1e-4)
    tuned = contenders.CONTENDERS["gpt-192"]
    assert rate(tuned, 1000, 0.4) == pytest.approx(tuned.lr) and rate(tuned, 1000, 1.0) == 0.0


def test_a_contender_learns_and_spends_its_time(contenders):
    contender = contenders.Contender(1, 2, 16, block=8, batch=4, vocab=None, lr=1e-2, schedule="linear", warmup_steps=1)
    tokens = np.tile(np.arange(7), 60)
    corpus = contenders.Corpus(tokens, tokens[:100], 100, 7, math.log(7))
    result = contenders.run(contender, corpus, seconds=2.0)
    assert result["bits_per_byte"] < 0.5 * math.log2(7)
    assert result["seconds"] >= 2.0 and result["tokens"] == result["steps"] * 32
