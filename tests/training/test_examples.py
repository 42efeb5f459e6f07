"""Steps and scores on examples: exact whatever the microbatches, and nothing counted but what is predicted."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.config import ModelConfig, ObjectiveConfig, TokenizerConfig
from cramjax.data.examples import ExampleFile, ExamplesConfig, prepare_examples
from cramjax.data.tokenizer import make_tokenizer
from cramjax.errors import ConfigError
from cramjax.model import make_model, objective_for
from cramjax.training.heldout import HeldOutRows
from cramjax.training.opening import open_run
from cramjax.training.step import Batch, State, make_step

from ..model import small
from .test_walk import check, differentiated

LENGTH, ROWS = 64, 4
TOKENIZER = make_tokenizer(TokenizerConfig(kind="bytes"), [])
MODEL = make_model(
    ModelConfig(layers=1, width=16, heads=2, mlp=16),
    vocab_size=TOKENIZER.vocab_size,
    sequence_length=LENGTH,
    causal=True,
    separator_id=TOKENIZER.separator_id,
)
OBJECTIVE = objective_for(ObjectiveConfig(kind="examples"), MODEL)
PARAMS = jax.tree.map(lambda p: 4 * p, MODEL.init(jax.random.key(0)))  # predictions that are not uniform


class _Descent(NamedTuple):
    """Gradient descent at rate 1: new parameters tell gradients."""

    def update(self, gradients: Any, state: Any, params: Any, fraction: Any, objective: Any) -> Any:
        del fraction, objective
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        new = jax.tree.map(lambda p, g: p - g, params, gradients)
        return new, state, {"grad_norm": norm, "lr": jnp.float32(1)}


STEP = jax.jit(make_step(OBJECTIVE, _Descent()))  # pyright: ignore[reportArgumentType]
STATE = State(jnp.int32(0), PARAMS, (), jax.random.key_data(jax.random.key(1)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExampleFile]:
    """Examples of each format, of very different lengths."""
    directory = tmp_path_factory.mktemp("examples")
    chats, completions, texts = [], [], []
    for n in range(24):
        asked, said = "ask " * (n % 5), "say " * (n * n % 4) + "é"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] * (1 + (n % 7 == 0))
        chats.append({"messages": turns})
        completions.append({"prompt": asked, "completion": f"{said}{n}"})
        texts.append({"text": f"{said} {asked}{n}"})
    found = {}
    for format, rows in (("chat", chats), ("completion", completions), ("text", texts)):
        path = directory / f"{format}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        config = ExamplesConfig(str(path), format=format, cache_dir=str(directory), validation_fraction=0.2)  # pyright: ignore
        found[format] = prepare_examples(config, TOKENIZER, None, LENGTH).train
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["chat", "completion", "text"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_microbatches_of_ragged_rows_are_one_batch(format: str, data: st.DataObject, files: dict[str, ExampleFile]):
    """The bug of five other projects: means of microbatches that predict different numbers of tokens, averaged."""
    file = files[format]
    numbers = data.draw(st.lists(st.integers(0, len(file) - 1), min_size=ROWS, max_size=ROWS))
    kept = data.draw(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS).filter(any))
    rows = np.stack([file.row(number) for number in numbers])
    for row, examples in zip(rows, kept, strict=True):
        row[:, row[1] > examples] = 0  # so many examples of it, perhaps none: rows predict 0 to dozens of tokens
    each = [int((row[2] & (np.roll(row[1], 1) == row[1])).sum()) for row in rows]
    whole, metrics = STEP(STATE, Batch(jnp.asarray(rows[None]), jnp.int32(1)), 0.5)
    for parts in (2, 4):
        tokens = jnp.asarray(rows.reshape(parts, ROWS // parts, *rows.shape[1:]))
        state, others = STEP(STATE, Batch(tokens, jnp.int32(parts)), 0.5)
        # The same float32 sums, in another order.
        assert float(others.loss) == pytest.approx(float(metrics.loss), rel=1e-5)
        assert float(others.accuracy) == pytest.approx(float(metrics.accuracy), abs=1e-6)
        for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-5 * float(metrics.grad_norm))
    assert float(OBJECTIVE(PARAMS, jnp.asarray(rows), None, 0.0, True).tokens) == sum(each) > 0


def _log_probabilities(ids: np.ndarray) -> np.ndarray:
    """Of every next token of one example, padded to one length, in float64."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(_LOGITS(PARAMS, jnp.asarray(padded))[0, : len(ids) - 1], np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


_LOGITS = jax.jit(lambda params, tokens: MODEL.logits(params, MODEL.hidden(params, tokens)))


def test_scores_are_those_of_predicted_tokens_each_in_its_own_example(files: dict[str, ExampleFile]) -> None:
    file = files["chat"]
    found = HeldOutRows(OBJECTIVE, file, batch=3).evaluate(PARAMS)
    total, correct, predicted, text_bytes = 0.0, 0, 0, 0
    for number in file.order:
        example = file.store.example(int(number))
        each, targets, wanted = _log_probabilities(example.ids), example.ids[1:].astype(int), example.predicted[1:]
        total -= each[np.arange(len(targets)), targets][wanted].sum()
        correct += (each.argmax(-1) == targets)[wanted].sum()
        predicted += wanted.sum()
        text_bytes += example.text_bytes
    assert (found.tokens, found.bytes) == (predicted, text_bytes)
    assert found.loss == pytest.approx(total / predicted, rel=1e-5)
    assert found.accuracy == pytest.approx(correct / predicted)
    assert found.bits_per_byte == pytest.approx(total / np.log(2) / text_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.loss))


def test_scores_do_not_depend_on_the_batch_and_may_be_of_some_rows(files: dict[str, ExampleFile]) -> None:
    file = files["text"]
    first = HeldOutRows(OBJECTIVE, file, batch=1)
    second = HeldOutRows(OBJECTIVE, file, batch=4)
    assert first.evaluate(PARAMS).loss == pytest.approx(second.evaluate(PARAMS).loss, rel=1e-6)
    some = second.evaluate(PARAMS, 2 * LENGTH)
    assert some.tokens == sum(int(file.row(number)[2].sum()) for number in (0, len(file) // 2))
    assert some.bytes == sum(file.store.text_bytes[n] for row in (0, len(file) // 2) for n in file.members(row))


def test_training_on_text_refuses_the_objective_of_examples(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.kind=examples is not what a run without the groups"):
        open_run(tiny(objective__kind="examples"), tmp_path, None, print)


@pytest.mark.slow
def test_the_walk_that_hands_out_gradients_knows_examples() -> None:
    model = small.build("modern", layer_loop="scan")
    ids = jax.random.randint(jax.random.key(1), (2, small.LENGTH + 1), 2, small.VOCAB)
    numbers = jnp.asarray([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])
    rows = jnp.stack([ids, numbers, (numbers > 0) & (ids % 3 > 0)], axis=1).astype(jnp.int32)
    objective, params = objective_for(ObjectiveConfig(kind="examples"), model), small.trained_like(model)
    check(objective, params, rows, differentiated(objective, params, rows), "none")
