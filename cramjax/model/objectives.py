"""What training minimises: next-token and masked-token losses, summed in nats over a batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cramjax.config import ObjectiveConfig
from cramjax.errors import ConfigError
from cramjax.model.stack import Model


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
    """Predictions whose most likely token was right."""


def objective_for(
    config: ObjectiveConfig, model: Model, *, mask_id: int | None = None
) -> Callable[[PyTree, Array, Array | None, float | Array, bool], Loss]:
    """The loss function of an objective: `(params, tokens, rng, fraction, train) -> Loss`.

    It takes int32 tokens (batch, seq + 1) for the causal objective and (batch, seq) for the masked one, a random key
    (masking, dropout), the spent fraction (traced), and whether dropout applies. Evaluation (train=False) masks at the
    final rate.

    Args:
        config: which objective.
        model: gives the predictions.
        mask_id: the tokenizer's mask token, needed by the masked objective.

    Raises:
        ConfigError: a masked objective and a tokenizer without a mask token.
    """
    if config.kind == "causal":

        def causal(params: PyTree, tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Loss:
            return causal_loss(model, params, tokens, rng if train else None, z_loss=config.z_loss, padded=not train)

        return causal
    if mask_id is None:
        raise ConfigError("objective.kind=masked needs a tokenizer with a [MASK] token, and this one has none.")
    end = config.mask_rate if config.mask_rate_end is None else config.mask_rate_end

    def masked(params: PyTree, tokens: Array, rng: Array | None, fraction: float | Array, train: bool) -> Loss:
        if rng is None:
            raise ValueError("the masked objective needs a random key, to choose what to mask")
        rate = config.mask_rate + (end - config.mask_rate) * fraction if train else end
        return masked_loss(
            model,
            params,
            tokens,
            rng,
            rate,
            mask_rate_max=max(config.mask_rate, end),
            mask_id=mask_id,
            z_loss=config.z_loss,
            train=train,
        )

    return masked


def causal_loss(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "batch tokens"],
    rng: Array | None = None,
    *,
    z_loss: float = 0.0,
    padded: bool = False,
) -> Loss:
    """Loss of predicting each token from those before it.

    Args:
        model: a causal model.
        params: its parameters.
        tokens: token ids (batch, seq + 1); all but the first are predicted.
        rng: key for dropout; None: none.
        z_loss: weight of the squared log-partition.
        padded: whether rows may end in -1, which is not predicted.
    """
    targets = tokens[:, 1:].reshape(-1)
    weights, count = None, jnp.asarray(targets.size, jnp.float32)
    if padded:
        weights = (targets >= 0).astype(jnp.float32)
        count = jnp.sum(weights)
        tokens, targets = jnp.maximum(tokens, 0), jnp.maximum(targets, 0)
    hidden = model.hidden(params, tokens[:, :-1], rng=rng)
    sums = model.loss_sums(params, hidden.reshape(-1, hidden.shape[-1]), targets, weights, z_loss=z_loss)
    return Loss(sums.total, sums.nll, sums.penalty, count, sums.correct)


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
    """Loss of predicting masked tokens; the head runs on round(mask_rate_max · seq) positions of each row only.

    Args:
        model: a bidirectional model.
        params: its parameters.
        tokens: true token ids (batch, seq).
        rng: chooses positions and replacements, and drops out.
        rate: share of positions that count, at most `mask_rate_max`: exactly round(rate · seq) per row. May be traced.
        mask_rate_max: share of positions the head runs on.
        mask_id: the mask token.
        z_loss: weight of the squared log-partition.
        train: whether dropout applies. Without it, rows may end in -1, which is neither seen nor predicted.
    """
    mask_rng, dropout_rng = jax.random.split(rng)
    known = None if train else tokens >= 0
    masked = mask_tokens(
        tokens,
        mask_rng,
        rate,
        mask_rate_max=mask_rate_max,
        mask_id=mask_id,
        vocab_size=model.vocab_size,
        keep_id=model.separator_id if model.config.mask_documents else None,
    )
    # Documents are told apart by the true tokens: no random replacement moves a boundary.
    segment_ids = model.segment_ids(tokens) if model.config.mask_documents else None
    stream = model.stream(
        params,
        jnp.maximum(masked.tokens, 0),
        rng=dropout_rng if train else None,
        kv_mask=known,
        segment_ids=segment_ids,
    )
    hidden = model.head(params, jnp.take_along_axis(stream, masked.positions[..., None], axis=1))
    weights = masked.weights.reshape(-1)
    targets = jnp.maximum(masked.targets.reshape(-1), 0)
    sums = model.loss_sums(params, hidden.reshape(-1, hidden.shape[-1]), targets, weights, z_loss=z_loss)
    return Loss(sums.total, sums.nll, sums.penalty, jnp.sum(weights), sums.correct)


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
        rng: a random key.
        rate: share of positions to predict, at most `mask_rate_max`; it may be traced.
        mask_rate_max: share of positions returned; those beyond `rate` have weight 0 and are left as they are.
        mask_id: the mask token.
        vocab_size: random tokens are drawn below it.
        keep_id: a token to leave alone while others are left to choose.
    """
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
