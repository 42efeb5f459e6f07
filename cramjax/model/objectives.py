"""What training minimises: losses of tokens and of labels, summed over a batch (in nats, but for numbers)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cramjax.config import ObjectiveConfig
from cramjax.errors import ConfigError
from cramjax.model.layers import Context
from cramjax.model.model import Model


class Loss(NamedTuple):
    """Sums over the predictions of a batch; only `total` is differentiable."""

    total: Float[Array, ""]
    """What training minimises: nll + penalty."""
    nll: Float[Array, ""]
    """Negative log-likelihood in nats."""
    penalty: Float[Array, ""]
    """z-loss."""
    tokens: Float[Array, ""]
    """Tokens predicted."""
    correct: Float[Array, ""]
    """Predictions whose most likely token (or class) was right."""


class Task(NamedTuple):
    """What one batch asks of a model: what it sees, and what it is to predict."""

    tokens: Int[Array, "batch seq"]
    """What the model sees."""
    targets: Int[Array, " predictions"]
    weights: Float[Array, " predictions"] | None
    """Of each prediction in the sums; None: all 1."""
    predicted: Float[Array, ""]
    """Tokens predicted: the sum of the weights."""
    positions: Int[Array, "batch masked"] | None = None
    """Of the predictions in each row; None: all."""
    rng: Any = None
    """Dropout's random key; None: no dropout."""
    kv_mask: Bool[Array, "batch seq"] | None = None
    """False at padding."""
    segment_ids: Int[Array, "batch seq"] | None = None
    """Document of each token, where the model cannot tell."""
    places: Int[Array, "batch seq"] | None = None
    """Position of each token; None: 0, 1, …"""
    token_types: Int[Array, "batch seq"] | None = None
    """Which of two texts each token is of; None: 0."""
    labels: Int[Array, " batch"] | Float[Array, " batch"] | None = None
    """What is to be predicted of whole texts, in the place of tokens."""

    @property
    def seen(self) -> dict[str, Any]:
        """The arguments of `Model.embed` and `Model.stream` beside parameters."""
        own = {"tokens": self.tokens, "positions": self.places, "rng": self.rng}
        own |= {"kv_mask": self.kv_mask, "segment_ids": self.segment_ids}
        return own | ({} if self.token_types is None else {"token_types": self.token_types})


@dataclass(frozen=True)
class Objective:
    """A loss over a stack, whole or in the pieces of its walk: `task`, `start`, the model's blocks, `end`.

    Called, it is the loss function `(params, tokens, rng, fraction, train) -> Loss`. It takes int32 tokens
    (batch, seq + 1) for the causal objective, (batch, seq) for the masked one and (batch, 3, seq + 1) for those of
    examples and labels, a random key (masking, dropout), the spent fraction (traced), and whether dropout applies.
    Evaluation (train=False) masks at the final rate, and takes a key for each row: what is masked of a sequence then
    depends on nothing beside it.
    """

    model: Model
    task: Callable[[Array, Array | None, float | Array, bool], Task]
    """`(tokens, rng, fraction, train) -> Task`."""
    z_loss: float

    def __call__(self, params: PyTree, tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Loss:
        """The loss of a batch."""
        return task_loss(self.model, params, self.task(tokens, rng, fraction, train), z_loss=self.z_loss)

    def start(
        self, outer: PyTree, task: Task, rows: Float[Array, "batch seq embed"] | None = None
    ) -> tuple[Float[Array, "batch seq embed"], Context]:
        """The start of the walk: the residual stream, and what the blocks read beside it.

        Args:
            outer: parameters, of which `embed` is read.
            task: from `task`.
            rows: the token table's rows of the task's tokens. Default: looked up.
        """
        with jax.named_scope("embed"):
            return self.model.embed(outer, **task.seen, rows=rows)

    def end(self, outer: PyTree, task: Task, stream: Float[Array, "batch seq embed"]) -> Loss:
        """The end of the walk: the loss of the stream that leaves the last block.

        Args:
            outer: parameters, of which `head` is read, and `embed` where the head is tied to it.
            task: from `task`.
            stream: after the last block.
        """
        return _end(self.model, outer, task, stream, z_loss=self.z_loss)


def objective_for(config: ObjectiveConfig, model: Model, *, mask_id: int | None = None) -> Objective:
    """The objective that a configuration describes.

    Args:
        config: which objective.
        model: gives the predictions.
        mask_id: the tokenizer's mask token, needed by the masked objective.

    Raises:
        ConfigError: a masked objective and a tokenizer without a mask token, or that of examples and a masked model.
    """
    if config.labelled:
        return Objective(model, labels_objective(model), config.z_loss)
    if config.kind == "preference":
        from cramjax.model.preferences import Preferences  # which is an objective itself

        return Preferences(model, lambda tokens, *_: examples_task(tokens), config.z_loss, config.beta)
    if config.kind == "examples":
        if not model.causal:
            raise ConfigError(
                "objective.kind=examples predicts what follows, and this model (masked, or an encoder) sees all tokens "
                "at once: tune a causal model on examples, or this one on labels."
            )

        def examples(tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Task:
            del fraction
            return examples_task(tokens, rng if train else None)

        return Objective(model, examples, config.z_loss)
    if config.kind == "causal":

        def causal(tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Task:
            del fraction
            return causal_task(tokens, rng if train else None, padded=not train)

        return Objective(model, causal, config.z_loss)
    if mask_id is None:
        raise ConfigError("objective.kind=masked needs a tokenizer with a [MASK] token, and this one has none.")
    end = config.mask_rate if config.mask_rate_end is None else config.mask_rate_end

    def masked(tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Task:
        if rng is None:
            raise ValueError("the masked objective needs a random key, to choose what to mask")
        rate = config.mask_rate + (end - config.mask_rate) * fraction if train else end
        most = max(config.mask_rate, end)
        return masked_task(model, tokens, rng, rate, mask_rate_max=most, mask_id=mask_id, train=train)

    return Objective(model, masked, config.z_loss)


def task_loss(model: Model, params: PyTree, task: Task, *, z_loss: float = 0.0) -> Loss:
    """The loss of a task, by the whole walk.

    Args:
        model: gives the predictions.
        params: all its parameters.
        task: of a batch.
        z_loss: weight of the squared log-partition.
    """
    return _end(model, params, task, model.stream(params, **task.seen), z_loss=z_loss)


def causal_loss(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "batch tokens"],
    rng: Array | None = None,
    *,
    z_loss: float = 0.0,
    padded: bool = False,
) -> Loss:
    """Loss of predicting each token from those before it; arguments as of `causal_task` and `task_loss`."""
    return task_loss(model, params, causal_task(tokens, rng, padded=padded), z_loss=z_loss)


def masked_loss(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    rng: Array,
    rate: float | Array,
    *,
    mask_rate_max: float,
    mask_id: int,
    z_loss: float = 0.0,
    train: bool = True,
) -> Loss:
    """Loss of predicting masked tokens; arguments as of `masked_task` and `task_loss`."""
    task = masked_task(model, tokens, rng, rate, mask_rate_max=mask_rate_max, mask_id=mask_id, train=train)
    return task_loss(model, params, task, z_loss=z_loss)


def causal_task(tokens: Int[Array, "batch tokens"], rng: Array | None = None, *, padded: bool = False) -> Task:
    """Predict each token from those before it.

    Args:
        tokens: token ids (batch, seq + 1); all but the first are predicted.
        rng: key for dropout; None: none.
        padded: whether rows may end in -1, which is not predicted.
    """
    targets = tokens[:, 1:].reshape(-1)
    weights, predicted = None, jnp.asarray(targets.size, jnp.float32)
    if padded:
        weights = (targets >= 0).astype(jnp.float32)
        predicted = jnp.sum(weights)
        tokens, targets = jnp.maximum(tokens, 0), jnp.maximum(targets, 0)
    return Task(tokens[:, :-1], targets, weights, predicted, rng=rng)


def examples_task(rows: Int[Array, "batch 3 tokens"], rng: Array | None = None) -> Task:
    """Predict what is to be predicted of examples, of which several lie in a row and none sees another.

    Every example stands as if it were alone: its positions begin at 0. The sums are over predicted tokens, so that
    those of microbatches add up to those of their batch, however many tokens each predicts.

    Args:
        rows: token ids, the number of the example within the row from 1, and 1 where the token is to be predicted
            (batch, 3, seq + 1); 0 at padding. The first token of an example is never predicted.
        rng: key for dropout; None: none.
    """
    ids, numbers, predicted = rows[:, 0], rows[:, 1], rows[:, 2]
    same = numbers[:, 1:] == numbers[:, :-1]
    weights = (same & (predicted[:, 1:] > 0)).astype(jnp.float32).reshape(-1)
    index = jnp.arange(ids.shape[1] - 1, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones_like(same[:, :1]), ~same[:, :-1]], axis=1)
    places = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    targets = ids[:, 1:].reshape(-1)
    segments = numbers[:, :-1]
    return Task(ids[:, :-1], targets, weights, jnp.sum(weights), rng=rng, segment_ids=segments, places=places)


class Labelled(NamedTuple):
    """A batch of labelled texts: what a model sees of each, and the label."""

    tokens: Int[Array, "batch seq"]
    token_types: Int[Array, "batch seq"]
    kv_mask: Bool[Array, "batch seq"]
    """False at padding."""
    labels: Int[Array, " batch"] | Float[Array, " batch"]
    """Numbers of classes, or the numbers to be predicted."""


def labelled(rows: Int[Array, "batch 3 columns"], *, classes: bool) -> Labelled:
    """Rows of `cramjax.data.examples.LabelledFile` as what they stand for.

    Args:
        rows: token ids, types, and 1 where there is a token; the last column holds the label (batch, 3, seq + 1).
        classes: whether labels are classes.
    """
    ids, types, there = rows[:, 0], rows[:, 1], rows[:, 2]
    labels = ids[:, -1] if classes else jax.lax.bitcast_convert_type(ids[:, -1], jnp.float32)
    return Labelled(ids[:, :-1], types[:, :-1], there[:, :-1] > 0, labels)


def labels_objective(model: Model) -> Callable[..., Task]:
    """What a batch of labelled rows asks of a model with a classifier.

    Raises:
        ConfigError: the model has none.
    """
    if model.config.classifier is None:
        raise ConfigError("labels need a model with a head for them: tune one with the group `labels`.")
    classes = bool(model.config.classifier.labels)

    def task(rows: Array, rng: Array | None, fraction: float | Array, train: bool) -> Task:
        del fraction
        return labels_task(rows, rng if train else None, classes=classes, causal=model.causal, typed=model.typed)

    return task


def labels_task(
    rows: Int[Array, "batch 3 columns"], rng: Array | None = None, *, classes: bool, causal: bool, typed: bool
) -> Task:
    """Predict the label of each text from one of its tokens: the first, or of a causal model the last.

    The sums are over texts, so that those of microbatches add up to those of their batch. Rows without a token are
    padding, and count as nothing.

    Args:
        rows: as of `labelled`.
        rng: key for dropout; None: none.
        classes: whether labels are classes.
        causal: whether each token sees only those before it.
        typed: whether the model tells two texts apart.
    """
    batch = labelled(rows, classes=classes)
    there = jnp.any(batch.kv_mask, axis=1)
    last = jnp.maximum(jnp.sum(batch.kv_mask, axis=1, dtype=jnp.int32) - 1, 0)
    return Task(
        tokens=batch.tokens,
        targets=jnp.zeros_like(last),
        weights=there.astype(jnp.float32),
        predicted=jnp.sum(there, dtype=jnp.float32),
        positions=(last if causal else jnp.zeros_like(last))[:, None],
        rng=rng,
        # A row of padding sees itself: attention to nothing is no number.
        kv_mask=batch.kv_mask | ~there[:, None],
        token_types=batch.token_types if typed else None,
        labels=batch.labels,
    )


def outputs_of(model: Model, params: PyTree, task: Task) -> Float[Array, "batch outputs"]:
    """Logits of classes, or the one number, of each text of a task of labels."""
    return _outputs(model, params, task, model.stream(params, **task.seen))


def _outputs(model: Model, outer: PyTree, task: Task, stream: Float[Array, "batch seq embed"]) -> Array:
    assert task.positions is not None, "one token speaks for each text"
    with jax.named_scope("head"):
        chosen = jnp.take_along_axis(stream, task.positions[..., None], axis=1)[:, 0]
        rng = None if task.rng is None else jax.random.fold_in(task.rng, 2)  # 0 and 1 are the stack's
        return model.classify(outer, chosen, rng)


def _labels_end(model: Model, outer: PyTree, task: Task, stream: Float[Array, "batch seq embed"]) -> Loss:
    """Cross entropy of classes in nats, or squared errors of numbers."""
    outputs, weights, labels = _outputs(model, outer, task, stream), task.weights, task.labels
    assert weights is not None and labels is not None, "a task of labels"
    if model.config.classifier is not None and model.config.classifier.labels:
        log_shares = jax.nn.log_softmax(outputs)
        each = -jnp.take_along_axis(log_shares, labels[:, None], axis=1)[:, 0]
        right = jnp.argmax(outputs, axis=1) == labels
    else:
        each = jnp.square(outputs[:, 0] - labels)
        right = jnp.zeros_like(labels, dtype=bool)
    total = jnp.sum(jnp.where(weights > 0, weights * each, 0.0))
    return Loss(total, total, jnp.zeros_like(total), task.predicted, jnp.sum(weights * right))


def masked_task(
    model: Model,
    tokens: Int[Array, "batch seq"],
    rng: Array,
    rate: float | Array,
    *,
    mask_rate_max: float,
    mask_id: int,
    train: bool = True,
) -> Task:
    """Predict masked tokens; the head runs on round(mask_rate_max · seq) positions of each row only.

    Args:
        model: a bidirectional model.
        tokens: true token ids (batch, seq).
        rng: chooses positions and replacements, and drops out; without dropout it may be a key for each row (batch,).
        rate: share of positions that count, at most `mask_rate_max`: exactly round(rate · seq) per row. May be traced.
        mask_rate_max: share of positions the head runs on.
        mask_id: the mask token.
        train: whether dropout applies. Without it, rows may end in -1, which is neither seen nor predicted.
    """
    mask_rng, dropout_rng = (rng, None) if rng.ndim else jax.random.split(rng)
    masked = mask_tokens(
        tokens,
        mask_rng,
        rate,
        mask_rate_max=mask_rate_max,
        mask_id=mask_id,
        vocab_size=model.vocab_size,
        keep_id=model.separator_id if model.config.mask_documents else None,
    )
    weights = masked.weights.reshape(-1)
    return Task(
        tokens=jnp.maximum(masked.tokens, 0),
        targets=jnp.maximum(masked.targets.reshape(-1), 0),
        weights=weights,
        predicted=jnp.sum(weights),
        positions=masked.positions,
        rng=dropout_rng if train else None,
        kv_mask=None if train else tokens >= 0,
        # Documents are told apart by the true tokens: no random replacement moves a boundary.
        segment_ids=model.segment_ids(tokens) if model.config.mask_documents else None,
    )


def _end(model: Model, outer: PyTree, task: Task, stream: Float[Array, "batch seq embed"], *, z_loss: float) -> Loss:
    if task.labels is not None:
        return _labels_end(model, outer, task, stream)
    with jax.named_scope("head"):
        if task.positions is not None:
            stream = jnp.take_along_axis(stream, task.positions[..., None], axis=1)
        hidden = model.head(outer, stream)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    sums = model.loss_sums(outer, hidden, task.targets, task.weights, z_loss=z_loss)
    return Loss(sums.total, sums.nll, sums.penalty, task.predicted, sums.correct)


class MaskedTokens(NamedTuple):
    """A corrupted batch and what is to be predicted."""

    tokens: Int[Array, "batch seq"]
    positions: Int[Array, "batch masked"]
    targets: Int[Array, "batch masked"]
    weights: Float[Array, "batch masked"]
    """1 where the prediction counts at the current rate, else 0."""


def mask_tokens(
    tokens: Int[Array, "batch seq"],
    rng: Array,
    rate: float | Array,
    *,
    mask_rate_max: float,
    mask_id: int,
    vocab_size: int,
    keep_id: int | None = None,
) -> MaskedTokens:
    """Corrupt exactly round(rate · seq) random positions of each row: 80% to the mask, 10% to a random token, 10% stay.

    The rule is BERT's (Devlin et al. 2019, section 3.1), with a fixed count per row (Geiping & Goldstein 2022).

    Args:
        tokens: true token ids (batch, seq); -1 stands for none.
        rng: a random key, or one for each row (batch,), on which alone what becomes of the row then depends.
        rate: share of positions to predict, at most `mask_rate_max`; it may be traced.
        mask_rate_max: share of positions returned; those beyond `rate` have weight 0 and are left as they are.
        mask_id: the mask token.
        vocab_size: random tokens are drawn below it.
        keep_id: a token to leave alone while others are left to choose.
    """
    if rng.ndim:
        options = {"mask_rate_max": mask_rate_max, "mask_id": mask_id, "vocab_size": vocab_size, "keep_id": keep_id}
        each = jax.vmap(lambda row, key: mask_tokens(row[None], key, rate, **options))(tokens, rng)
        return jax.tree.map(lambda x: x[:, 0], each)
    batch, length = tokens.shape
    order_rng, kind_rng, token_rng = jax.random.split(rng, 3)
    scores = jnp.where(tokens >= 0, jax.random.uniform(order_rng, tokens.shape), -2.0)
    if keep_id is not None:
        scores = jnp.where(tokens == keep_id, -1.0, scores)
    count = round(mask_rate_max * length)
    positions = jax.lax.top_k(scores, count)[1]
    targets = jnp.take_along_axis(tokens, positions, axis=1)
    counted = (jnp.arange(count) < jnp.round(rate * length)) & (targets >= 0)
    kind = jax.random.uniform(kind_rng, positions.shape)
    random_tokens = jax.random.randint(token_rng, positions.shape, 0, vocab_size, tokens.dtype)
    corrupted = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, random_tokens, targets))
    corrupted = jnp.where(counted, corrupted, targets).astype(tokens.dtype)
    return MaskedTokens(
        tokens=tokens.at[jnp.arange(batch)[:, None], positions].set(corrupted, unique_indices=True),
        positions=positions,
        targets=targets,
        weights=counted.astype(jnp.float32),
    )
