"""The objective of examples: each counts as if it were alone, wherever it lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ObjectiveConfig
from cramjax.errors import ConfigError
from cramjax.model import Model, objective_for
from cramjax.model.objectives import examples_task

from .small import LENGTH, SEPARATOR, VOCAB, build, trained_like

# Ids, and which of them are predicted. Separators within an example are tokens as others.
EXAMPLES: list[tuple[list[int], list[int]]] = [
    ([SEPARATOR, 7, 9, 7, SEPARATOR, 8], [0, 0, 0, 1, 1, 1]),
    ([5, 6, 7], [0, 1, 0]),
    ([SEPARATOR, 30, 31, 32, 31, 2], [0, 1, 1, 1, 1, 1]),
    ([9, SEPARATOR, 4], [0, 0, 1]),
]


def rows_of(*rows: list[tuple[list[int], list[int]]], length: int = LENGTH) -> jax.Array:
    """Rows of examples (rows, 3, length + 1)."""
    filled = np.zeros((len(rows), 3, length + 1), np.int32)
    for row, examples in zip(filled, rows, strict=True):
        at = 0
        for number, (ids, predicted) in enumerate(examples, 1):
            row[:, at : at + len(ids)] = ids, [number] * len(ids), predicted
            at += len(ids)
    return jnp.asarray(filled)


def objective(model: Model) -> Any:
    return objective_for(ObjectiveConfig(kind="examples"), model)


def alone(model: Model, params: Any, ids: jax.Array, predicted: jax.Array) -> jax.Array:
    """Summed loss of one example by its logits."""
    logits = model.logits(params, model.hidden(params, ids[None, :-1], segment_ids=jnp.ones_like(ids[None, :-1])))[0]
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=-1)[:, 0]
    return jnp.sum(each * predicted[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "modern"])  # rotary; learned positions; sliding windows and bigrams
def test_packed_examples_have_the_loss_and_gradients_of_each_alone(name: str) -> None:
    model = build(name)
    params = trained_like(model)
    one = jax.jit(jax.value_and_grad(lambda p, ids, flags: alone(model, p, ids, flags)))
    parts = [one(params, jnp.asarray(ids), jnp.asarray(flags, jnp.float32)) for ids, flags in EXAMPLES]
    wanted = sum(float(loss) for loss, _ in parts)
    gradients = jax.tree.map(lambda *g: sum(g), *(gradient for _, gradient in parts))

    @jax.jit
    def packed(rows: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: objective(model)(p, rows, None, 0.0, True).total)(params)

    rows = rows_of(EXAMPLES[1::-1], EXAMPLES[2:])  # and padding after them
    loss, found = packed(rows)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        # float32 sums of the same terms in another order.
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_positions_segments_and_weights_are_their_definition() -> None:
    rows = rows_of([EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[3]])
    task = examples_task(rows)
    assert task.places is not None and task.segment_ids is not None and task.weights is not None
    np.testing.assert_array_equal(task.places[0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(task.segment_ids[1], [1] * 3 + [0] * 9)
    # Prediction t is of token t + 1: never the first of an example, nor padding.
    np.testing.assert_array_equal(task.weights.reshape(2, -1)[0], [0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(task.weights.reshape(2, -1)[1], [0, 1] + [0] * 10)
    assert float(task.predicted) == 5
    flagged = rows.at[0, 2, 6].set(1)  # the first token of the second example: nothing predicts it
    np.testing.assert_array_equal(examples_task(flagged).weights, task.weights)


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_nothing_of_an_example_reaches_another(name: str) -> None:
    model = build(name)
    params = trained_like(model)

    def loss_of(number: int, rows: jax.Array) -> Any:
        only = rows.at[:, 2].multiply(rows[:, 1] == number)
        return objective(model)(params, only, None, 0.0, True).total

    both = jax.jit(lambda rows: (loss_of(1, rows), loss_of(2, rows)))
    first, second = both(rows_of(EXAMPLES[:2]))
    other_first, other_second = both(rows_of([([1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 0, 1]), EXAMPLES[1]]))
    assert float(second) == float(other_second) and float(first) != float(other_first)
    kept, other = both(rows_of([EXAMPLES[0], ([VOCAB - 1, 2, 3], [0, 1, 1])]))
    assert float(first) == float(kept) and float(second) != float(other)
    padded, _ = both(rows_of(EXAMPLES[:2]).at[:, 0, 9:].set(17))  # whatever lies in the padding
    assert float(first) == float(padded)


def test_masked_models_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"objective\.kind=examples predicts what follows, and this model \(masked"):
        objective(build("bert"))


def test_shapes_of_rows() -> None:
    shapes = {kind: ObjectiveConfig(kind=kind).row_shape(8) for kind in ("causal", "masked", "examples")}
    assert shapes == {"causal": (9,), "masked": (8,), "examples": (3, 9)}
    assert [ObjectiveConfig(kind=kind).causal for kind in shapes] == [True, False, True]
