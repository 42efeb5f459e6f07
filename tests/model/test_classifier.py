"""The head for labels: against transformers' BERT, exact over microbatches, trained beside adapters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.adapters import AdapterConfig
from cramjax.classifier import ClassifierConfig
from cramjax.config import ModelConfig, ObjectiveConfig
from cramjax.model import make_model, objective_for
from cramjax.model.objectives import labels_task, outputs_of
from cramjax.training.frozen import split, untrained
from cramjax.training.step import Batch, State, make_step

LENGTH, VOCABULARY = 12, 40
BERT = ModelConfig(
    layers=2, width=16, heads=2, mlp=32, activation="gelu", norm_eps=1e-12, norm_position="post", bias=True,
    positions="learned", max_positions=LENGTH, token_types=2, embedding_norm=True, final_norm=False,
    classifier=ClassifierConfig(("a", "b", "c")),
)  # fmt: skip


def model_of(config: ModelConfig, *, causal: bool = False, **options: Any) -> Any:
    return make_model(config, vocab_size=VOCABULARY, sequence_length=LENGTH, causal=causal, **options)


def rows_of(count: int, classes: int = 3) -> np.ndarray:
    """Texts of two parts and of very different lengths, with labels."""
    rng, rows = np.random.default_rng(0), np.zeros((count, 3, LENGTH + 1), np.int32)
    for number, row in enumerate(rows):
        size = 2 + number * 5 % (LENGTH - 2)
        row[0, :size], row[1, size // 2 : size], row[2, :size] = rng.integers(1, VOCABULARY, size), 1, 1
        label = np.float32(rng.normal())
        row[0, -1] = number % classes if classes else label.view(np.int32)
    return rows


@pytest.mark.parametrize("target", ["class", "number"])
def test_logits_losses_and_gradients_are_those_of_transformers(target: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    names = ("a", "b", "c") if target == "class" else ()
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=max(1, len(names)), attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification(config).eval()
    model = model_of(ModelConfig(**{**vars(BERT), "classifier": ClassifierConfig(names)}))
    state = {name: value.detach().double().numpy() for name, value in theirs.state_dict().items()}
    params = _bert_params(model, state)
    rows = rows_of(5, len(names))
    task = labels_task(jnp.asarray(rows), classes=bool(names), causal=False, typed=True)
    there = torch.tensor(rows[:, 2, :-1])
    seen = {"input_ids": torch.tensor(rows[:, 0, :-1]), "token_type_ids": torch.tensor(rows[:, 1, :-1])}
    label = rows[:, 0, -1]
    labels = torch.tensor(label).long() if names else torch.tensor(label.copy().view(np.float32))
    out = theirs(**seen, attention_mask=there, labels=labels)
    found = jax.jit(lambda p: outputs_of(model, p, task))(params)
    np.testing.assert_allclose(found, out.logits.detach(), atol=2e-6)
    objective = objective_for(ObjectiveConfig(kind="labels"), model)
    differentiate = jax.value_and_grad(lambda p: objective(p, jnp.asarray(rows), None, 1.0, False).total / 5)
    loss, gradients = jax.jit(differentiate)(params)
    assert float(loss) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    out.loss.backward()
    wanted = dict(theirs.named_parameters())
    for ours, name in (("dense", "bert.pooler.dense.weight"), ("linear", "classifier.weight")):
        found = gradients["head"]["classifier"][ours]["kernel"].T
        np.testing.assert_allclose(found, wanted[name].grad, atol=1e-6)
    table = wanted["bert.embeddings.word_embeddings.weight"].grad
    np.testing.assert_allclose(gradients["embed"]["token"]["table"][1:VOCABULARY], table[1:], atol=1e-6)


def _bert_params(model: Any, state: dict[str, np.ndarray]) -> Any:
    """The weights of `transformers`' BERT by hand, and not by the table of the import."""

    def linear(name: str) -> dict[str, Any]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, Any]:
        return {"weight": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(number: int) -> dict[str, Any]:
        at = f"bert.encoder.layer.{number}"
        parts = [linear(f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
        qkv = {key: np.concatenate([part[key] for part in parts], -1) for key in ("kernel", "bias")}
        return {
            "attention": {"qkv": qkv, "out": linear(f"{at}.attention.output.dense")},
            "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
            "mlp": {"up": linear(f"{at}.intermediate.dense"), "down": linear(f"{at}.output.dense")},
            "mlp_norm": norm(f"{at}.output.LayerNorm"),
        }

    rows = model.abstract_params()["embed"]["token"]["table"].shape[0]
    table = np.zeros((rows, 16))
    table[:VOCABULARY] = state["bert.embeddings.word_embeddings.weight"]
    params = {
        "embed": {
            "token": {"table": table},
            "position": {"table": state["bert.embeddings.position_embeddings.weight"]},
            "token_type": {"table": state["bert.embeddings.token_type_embeddings.weight"]},
            "norm": norm("bert.embeddings.LayerNorm"),
        },
        "blocks": jax.tree.map(lambda *x: np.stack(x), block(0), block(1)),
        "head": {"classifier": {"dense": linear("bert.pooler.dense"), "linear": linear("classifier")}},
    }
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract_params())
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


class _Descent(NamedTuple):
    """Gradient descent at rate 1: new parameters tell gradients."""

    def update(self, gradients: Any, state: Any, params: Any, fraction: Any, objective: Any) -> Any:
        del fraction, objective
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        return jax.tree.map(lambda p, g: p - g, params, gradients), state, {"grad_norm": norm, "lr": jnp.float32(1)}


@pytest.mark.parametrize("causal", [False, True])
def test_microbatches_of_ragged_texts_are_one_batch(causal: bool) -> None:
    """Also where rows of padding make them hold different numbers of texts."""
    small = ModelConfig(layers=1, width=16, heads=2, mlp=16, classifier=ClassifierConfig(("no", "yes"), 8, dropout=0.0))
    model = model_of(small, causal=causal)
    kind = "causal_labels" if causal else "labels"
    objective = objective_for(ObjectiveConfig(kind=kind), model)
    params = jax.tree.map(lambda p: 4 * p, model.init(jax.random.key(0)))
    state = State(jnp.int32(0), params, (), jax.random.key_data(jax.random.key(1)))
    step = jax.jit(make_step(objective, _Descent()))  # pyright: ignore[reportArgumentType]
    rows = rows_of(8, 2)
    rows[[1, 4, 5]] = 0
    whole, metrics = step(state, Batch(jnp.asarray(rows[None]), jnp.int32(1)), 0.5)
    assert float(objective(params, jnp.asarray(rows), None, 0.0, True).tokens) == 5
    for parts in (2, 4):
        tokens = jnp.asarray(rows.reshape(parts, 8 // parts, *rows.shape[1:]))
        found, others = step(state, Batch(tokens, jnp.int32(parts)), 0.5)
        # The same float32 sums, in another order.
        assert float(others.loss) == pytest.approx(float(metrics.loss), rel=1e-5)
        assert float(others.accuracy) == pytest.approx(float(metrics.accuracy), abs=1e-6)
        for got, wanted in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-5 * float(metrics.grad_norm))


def test_a_text_has_the_same_label_whatever_pads_it() -> None:
    """The first token of an encoder and the last of a causal model speak for the text, and padding is not seen."""
    for causal in (False, True):
        model = model_of(ModelConfig(layers=2, width=16, heads=2, mlp=16, classifier=ClassifierConfig()), causal=causal)
        params = jax.tree.map(lambda p: 4 * p, model.init(jax.random.key(0)))
        rows = rows_of(4, 0)
        task = labels_task(jnp.asarray(rows), classes=False, causal=causal, typed=False)
        found, stream = jax.jit(lambda p: outputs_of(model, p, task))(params), jax.jit(model.stream)  # noqa: B023
        for number, row in enumerate(rows):
            size = int(row[2].sum())
            hidden = stream(params, jnp.asarray(row[None, 0, :size]))[:, -1 if causal else 0]
            alone = model.classify(params, hidden, None)
            np.testing.assert_allclose(found[number], alone[0], atol=1e-5)


@pytest.mark.parametrize("base", ["float32", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "bitfit"])
def test_the_head_is_trained_beside_adapters(kind: Any, base: Any) -> None:
    config = ModelConfig(layers=1, width=16, heads=2, mlp=64, bias=True, classifier=ClassifierConfig(("no", "yes")))
    model = model_of(config, adapter=AdapterConfig(kind=kind, rank=2, base=base))
    trained, frozen = split(model.init(jax.random.key(0)), untrained(model, ()))
    head = trained["head"]["classifier"]
    assert {part: set(head[part]) for part in head} == {"dense": {"kernel", "bias"}, "linear": {"kernel", "bias"}}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(head))
    assert not jax.tree.leaves(frozen["head"]["classifier"]) and jax.tree.leaves(frozen["embed"])


def test_dropout_of_the_head_is_in_training_alone() -> None:
    model = model_of(
        ModelConfig(layers=1, width=16, heads=2, mlp=16, classifier=ClassifierConfig(("a", "b"), 400, 0.5))
    )
    params = model.init(jax.random.key(0))
    params["head"]["classifier"]["linear"]["kernel"] = jnp.eye(400)[:, :2] * 3
    params["head"]["classifier"]["dense"]["bias"] = jnp.ones(400)
    objective, rows = objective_for(ObjectiveConfig(kind="labels"), model), jnp.asarray(rows_of(6, 2))
    loss = jax.jit(lambda key, train: objective(params, rows, key, 1.0, train).total, static_argnums=1)
    scored = [float(loss(jax.random.key(key), False)) for key in range(2)]
    trained = {float(loss(jax.random.key(key), True)) for key in range(3)}
    assert scored[0] == scored[1] and len(trained) == 3 and scored[0] not in trained
