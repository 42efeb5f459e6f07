"""The PyTorch contenders score every token once, follow their published schedule, and are the models beside them."""

import importlib.util
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.recipes import override
from cramjax.training.parts import Vocabulary, build_model

torch = pytest.importorskip("torch", reason="needs the extra `parity`")


def _script(name: str):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def contenders():
    return _script("torch_gpt")


@pytest.fixture(scope="module")
def gpu(contenders):
    return _script("gpu")


@pytest.mark.parametrize("count", [1, 9, 17, 40])
def test_every_validation_token_is_scored_once(contenders, count: int):
    """Against the definition: for each token after the first, the log-softmax given its own block before it."""
    contender = contenders.Contender(1, 2, 16, block=8, batch=2, vocab=None, lr=1e-3, schedule="cosine")
    torch.manual_seed(0)
    model = contenders.gpt(contender, 11)
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


def _tiny(gpu, name: str):
    """A shape of the benchmark, tiny, and the same model in both libraries, without the weights that start at zero."""
    config = gpu.config_of(gpu.SHAPES[name], quick=True)
    model = build_model(config, Vocabulary(config.tokenizer.vocab_size, separator_id=0, mask_id=1), "float32")
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), model.init(jax.random.key(0)))
    return config, model, params


def _torch_names(tree) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, of CramJAX by the names that the PyTorch side gives them."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        *layers, kind = [str(entry.key) for entry in path]
        value = np.asarray(value)
        value = value.swapaxes(-1, -2) if kind == "kernel" else value
        kind = "bias" if kind == "bias" else "weight"
        match layers:
            case ["blocks", *inner]:
                name = {"attention_norm": "norm1", "mlp_norm": "norm2"}.get(inner[0], inner[-1])
                found |= {f"blocks.{layer}.{name}.{kind}": value[layer] for layer in range(len(value))}
            case ["embed", "position"]:
                found["scale" if value.ndim == 0 else "positions.weight"] = value
            case ["embed", inner]:
                found[{"token": "tokens", "norm": "embedding_norm"}[inner] + f".{kind}"] = value
            case ["head", inner]:
                found[{"norm": "norm", "decoder": "head"}[inner] + f".{kind}"] = value
    return found


@pytest.mark.parametrize("name", ["gpt-124m", "crammed-bert", "gpt-mini", "gpt2-124m"])
def test_both_sides_of_the_gpu_benchmark_are_the_same_model(gpu, contenders, name: str):
    """Loss and every gradient, from the same weights and tokens, in float32."""
    config, model, params = _tiny(gpu, name)
    rng = np.random.default_rng(0)
    vocab, seq = config.tokenizer.vocab_size, config.data.sequence_length
    tokens, causal = rng.integers(0, vocab, (3, seq + 1)), config.objective.kind == "causal"
    where = None if causal else np.argsort(rng.random((3, seq)), axis=1)[:, : seq // 4]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if where is not None:
        targets = np.take_along_axis(targets, where, axis=1)

    def loss(params):
        stream = model.stream(params, jnp.asarray(inputs))
        if where is not None:
            stream = jnp.take_along_axis(stream, where[..., None], axis=1)
        log_p = jax.nn.log_softmax(model.logits(params, model.head(params, stream)))
        return -jnp.sum(jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1))

    wanted, gradients = jax.value_and_grad(loss)(params)
    peer = contenders.Transformer(contenders.architecture_of(config, "float32"))
    peer.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in _torch_names(params).items()})
    total = peer(*(None if x is None else torch.from_numpy(x.copy()) for x in (inputs, targets, where)))
    total.backward()
    # Two implementations in float32, whose sums run in another order.
    assert total.item() == pytest.approx(float(wanted), rel=1e-5)
    for name, gradient in _torch_names(gradients).items():
        found = dict(peer.named_parameters())[name].grad.numpy()
        assert np.linalg.norm(found - gradient) < 1e-4 * np.linalg.norm(gradient), name


def test_masks_hide_what_bert_hides(contenders):
    torch.manual_seed(0)
    tokens = torch.randint(2, 1000, (400, 100))
    shown, where, targets = contenders.mask_tokens(tokens, 0.25, mask_id=1, vocab=1000)
    assert where.shape == (400, 25) and torch.equal(targets, tokens.gather(1, where))
    assert all(len(set(row)) == 25 for row in where.tolist())
    changed = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, where, True)
    assert torch.equal(shown[~changed], tokens[~changed])
    # Of 10,000 positions; within five standard deviations.
    hidden, kept = (shown[changed] == 1).double().mean(), (shown[changed] == tokens[changed]).double().mean()
    assert abs(hidden - 0.8) < 5 * 0.004 and abs(kept - 0.1) < 5 * 0.003


def test_a_model_that_the_other_side_lacks_is_refused(gpu, contenders):
    config = gpu.config_of(gpu.SHAPES["gpt-124m"], quick=True)
    for changes in ({"model.activation": "swiglu"}, {"model.embedding_skip": True}):
        with pytest.raises(ValueError, match=next(iter(changes)).removeprefix("model.")):
            contenders.architecture_of(override(config, changes), "float32")
