"""Small models that between them turn every option on, and a batch for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.config import ModelConfig
from cramjax.model import Model, make_model

VOCAB, LENGTH, SEPARATOR, MASK = 50, 12, 0, 1

CONFIGS: dict[str, ModelConfig] = {
    "modern": ModelConfig(
        layers=3,
        width=32,
        heads=4,
        kv_heads=2,
        mlp=48,
        activation="relu2",
        norm="rmsnorm",
        qk_norm=True,
        window=5,
        mask_documents=True,
        embedding_norm=True,
        tied=False,
        logit_softcap=10.0,
        embedding_skip=True,
        value_embeddings=True,
        bigram_buckets=19,
        init_std=None,
    ),
    "gpt2": ModelConfig(
        layers=2,
        width=24,
        heads=3,
        mlp=40,
        bias=True,
        positions="learned",
        max_positions=20,
        depth_scaled_init=True,
    ),
    "llama": ModelConfig(
        layers=2, width=24, heads=4, kv_heads=1, head_dim=8, mlp=40, activation="swiglu", norm="rmsnorm", tied=False
    ),
    "crammed": ModelConfig(
        layers=2,
        width=32,
        heads=2,
        mlp=24,
        activation="geglu",
        norm_eps=1e-12,
        positions="sinusoidal",
        embedding_norm=True,
    ),
    "bert": ModelConfig(
        layers=2,
        width=32,
        heads=2,
        mlp=48,
        activation="gelu",
        norm_position="post",
        bias=True,
        positions="learned",
        token_types=2,
        embedding_norm=True,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        norm_eps=1e-12,
    ),
    "bare": ModelConfig(
        layers=2, width=16, heads=2, mlp=16, norm_affine=False, norm="rmsnorm", positions="none", final_norm=False
    ),
    "adaptive": ModelConfig(layers=1, width=32, heads=2, mlp=32, tied=False, adaptive_head=(16, 32)),
}
CAUSAL = {name: name not in ("crammed", "bert") for name in CONFIGS}


def build(name: str, **options: Any) -> Model:
    """One of the models above."""
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": CAUSAL[name], "separator_id": SEPARATOR}
    return make_model(CONFIGS[name], **(arguments | options))


def trained_like(model: Model) -> Any:
    """Parameters with no zeros or ones left from initialisation, so that every one of them matters."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key in ("weight", "stream") else 0.0
        return jnp.asarray(centre + 0.15 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def batch(length: int = LENGTH) -> jax.Array:
    """Two rows of tokens, with a separator within the first and at the start of the second."""
    rows = jax.random.randint(jax.random.key(7), (2, length), 2, VOCAB)
    return rows.at[0, 5].set(SEPARATOR).at[1, 0].set(SEPARATOR).astype(jnp.int32)
