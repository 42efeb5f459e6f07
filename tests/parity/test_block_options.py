"""Options of the block against the `transformers` families that have them: logits in float32, whole and cached."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, RopeScaling
from cramjax.model import Model, make_model
from cramjax.model.positions import rotary_angles, rotary_frequencies

_EXTRA = "needs the `parity` extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_EXTRA)
transformers = pytest.importorskip("transformers", reason=_EXTRA)
rope = pytest.importorskip("transformers.modeling_rope_utils", reason=_EXTRA)

VOCAB, LENGTH, LAYERS = 130, 24, 4
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    **_TOKENS,
}
_OURS = {
    "layers": LAYERS,
    "width": 48,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 64,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "vocab_multiple": 1,
}
_GEMMA = {
    "head_dim": 16,
    "activation": "geglu_tanh",
    "norm_position": "sandwich",
    "embedding_scale": math.sqrt(48),
    "attention_scale": 20**-0.5,
}


def _families() -> dict[str, tuple[Callable[[], Any], ModelConfig]]:
    """Their model, and ours."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    llama3 = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    }

    def llama(**options: Any) -> Any:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**_SMALL, rms_norm_eps=1e-6, tie_word_embeddings=True, **options)
        )

    return {
        "qwen2": (
            lambda: transformers.Qwen2ForCausalLM(
                transformers.Qwen2Config(**_SMALL, tie_word_embeddings=True, rms_norm_eps=1e-6)
            ),
            ModelConfig(**_OURS, qkv_bias=True),
        ),
        "qwen3": (
            lambda: transformers.Qwen3ForCausalLM(
                transformers.Qwen3Config(**_SMALL, tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=16)
            ),
            ModelConfig(**_OURS, head_dim=16, qk_norm=True, qk_norm_weight=True),
        ),
        "gemma2": (
            lambda: transformers.Gemma2ForCausalLM(
                transformers.Gemma2Config(
                    **_SMALL,
                    head_dim=16,
                    query_pre_attn_scalar=20,
                    attn_logit_softcapping=2.0,
                    final_logit_softcapping=3.0,
                    sliding_window=64,
                )
            ),
            ModelConfig(**_OURS | _GEMMA, attention_softcap=2.0, logit_softcap=3.0),
        ),
        "llama, llama3 scaling": (
            lambda: llama(rope_parameters=llama3),
            ModelConfig(**_OURS, rope_scaling=RopeScaling("llama3", 4.0, original_positions=16)),
        ),
        "llama, yarn": (
            lambda: llama(rope_parameters=yarn),
            ModelConfig(**_OURS, rope_scaling=RopeScaling("yarn", 4.0, original_positions=16)),
        ),
    }


_FAMILIES = _families()


def _theirs(make: Callable[[], Any]) -> Any:
    """Their model, all of whose weights are random."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _params(model: Model, theirs: Any, plus: float) -> Any:
    """Our parameters from theirs; `plus` is what their norms add to their weights."""
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    sandwich = model.config.norm_position == "sandwich"

    def block(layer: int) -> dict[str, Any]:
        def of(name: str) -> np.ndarray | None:
            return state.get(f"model.layers.{layer}.{name}")

        def norm(name: str) -> dict[str, np.ndarray] | None:
            weight = of(f"{name}.weight")
            return None if weight is None else {"weight": weight + plus}

        def linear(*names: str) -> dict[str, np.ndarray]:
            kernels, biases = ([of(f"{name}.{part}") for name in names] for part in ("weight", "bias"))
            kernel = {"kernel": np.concatenate([k.T for k in kernels if k is not None], axis=1)}
            return kernel if biases[0] is None else kernel | {"bias": np.concatenate(biases)}  # pyright: ignore

        after = "post_attention_layernorm"
        tree = {
            "attention_norm": norm("input_layernorm"),
            "attention": {
                "qkv": linear(*(f"self_attn.{x}_proj" for x in "qkv")),
                "out": linear("self_attn.o_proj"),
                "query_norm": norm("self_attn.q_norm"),
                "key_norm": norm("self_attn.k_norm"),
            },
            "attention_out_norm": norm(after) if sandwich else None,
            "mlp_norm": norm("pre_feedforward_layernorm" if sandwich else after),
            "mlp_out_norm": norm("post_feedforward_layernorm"),
            "mlp": {"up": linear("mlp.gate_proj", "mlp.up_proj"), "down": linear("mlp.down_proj")},
        }
        tree["attention"] = {name: part for name, part in tree["attention"].items() if part is not None}
        return {name: part for name, part in tree.items() if part is not None}

    params = {
        "embed": {"token": {"table": state["model.embed_tokens.weight"]}},
        "blocks": jax.tree.map(lambda *each: np.stack(each), *(block(i) for i in range(LAYERS))),
        "head": {"norm": {"weight": state["model.norm.weight"] + plus}},
    }
    wanted = jax.tree.map(lambda leaf: leaf.shape, model.abstract_params() | {"head": {"norm": params["head"]["norm"]}})
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted
    return jax.tree.map(jnp.asarray, params) | {"head": params["head"] | {"decoder": {}}}


@pytest.mark.parametrize("family", _FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    make, config = _FAMILIES[family]
    theirs = _theirs(make)
    model = make_model(config, vocab_size=VOCAB, sequence_length=LENGTH, causal=True)
    params = _params(model, theirs, plus=float(family.startswith("gemma")))
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, LENGTH))
    expected = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    given = jnp.asarray(tokens, jnp.int32)
    got = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, given)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)

    decode, cache = jax.jit(model.decode), model.init_cache(2, LENGTH)
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        hidden, cache = decode(params, cache, given[:, start:stop])
        np.testing.assert_allclose(model.logits(params, hidden), expected[:, start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "named"),
    [
        (RopeScaling("linear", 3.0), {}),
        (
            RopeScaling("llama3", 8.0, original_positions=512, low_factor=1.0, high_factor=4.0),
            {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
        (RopeScaling("yarn", 4.0, original_positions=256), {}),
        (
            RopeScaling("yarn", 16.0, original_positions=512, beta_fast=20, beta_slow=2, truncate=False),
            {"beta_fast": 20, "beta_slow": 2, "truncate": False},
        ),
        (RopeScaling("yarn", 4.0, original_positions=256, attention_factor=1.5), {"attention_factor": 1.5}),
    ],
)
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_scaled_frequencies_are_those_of_transformers(ours: RopeScaling, named: dict[str, Any], base: float) -> None:
    parameters = {"rope_type": ours.kind, "rope_theta": base, "factor": ours.factor} | named
    parameters["original_max_position_embeddings"] = ours.original_positions
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=int(ours.original_positions * ours.factor),
        rope_parameters=parameters,
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS[ours.kind](config, "cpu")
    # Theirs are interpolated in float32.
    np.testing.assert_allclose(rotary_frequencies(64, base, ours), expected.numpy(), rtol=1e-5)
    cos, sin = rotary_angles(jnp.array([[0, 3]]), 64, base, ours)
    np.testing.assert_allclose(cos[0, 0], factor, rtol=1e-6)
    np.testing.assert_allclose(jnp.square(cos) + jnp.square(sin), factor**2, rtol=1e-5)
