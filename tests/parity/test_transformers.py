"""GPT-2, Llama and BERT as configurations of our block, against `transformers`: logits and all gradients in float32."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.model import Model, make_model
from cramjax.model.interchange import config_from_transformers, params_from_transformers

_EXTRA = "needs the `parity` extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_EXTRA)
transformers = pytest.importorskip("transformers", reason=_EXTRA)

VOCAB, LENGTH = 130, 24
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **_TOKENS}


def _theirs(kind: str) -> Any:
    """A model whose weights are all random: biases, norms and padding rows too."""
    match kind:
        case "gpt2":
            config = transformers.GPT2Config(
                vocab_size=VOCAB, n_positions=32, n_embd=48, n_layer=3, n_head=4, **_TOKENS
            )
            model = transformers.GPT2LMHeadModel(config)
        case "llama":
            config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=2, intermediate_size=64, rms_norm_eps=1e-5)
            model = transformers.LlamaForCausalLM(config)
        case _:
            config = transformers.BertConfig(**_SMALL, intermediate_size=96, max_position_embeddings=32)
            model = transformers.BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _ours(theirs: Any, **options: Any) -> Model:
    config = theirs.config.to_dict()
    kind = config["model_type"]
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": kind != "bert"}
    return make_model(config_from_transformers(config), **(arguments | options))


def _arrays(named: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in named}


def _tokens() -> np.ndarray:
    # Never the padding token, which gets no gradient in torch.
    return np.random.default_rng(0).integers(1, VOCAB, (2, LENGTH))


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_logits_and_gradients(kind: str, layer_loop: str) -> None:
    theirs = _theirs(kind)
    ours = _ours(theirs, layer_loop=layer_loop)
    params = params_from_transformers(_arrays(theirs.state_dict().items()), kind, ours)
    tokens, targets = _tokens(), np.random.default_rng(1).integers(0, VOCAB, 2 * LENGTH)

    expected = theirs(input_ids=torch.tensor(tokens)).logits
    torch.nn.functional.cross_entropy(expected.reshape(-1, VOCAB), torch.tensor(targets)).backward()

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = ours.hidden(params, jnp.asarray(tokens, jnp.int32))
        sums = ours.loss_sums(params, hidden.reshape(2 * LENGTH, -1), jnp.asarray(targets, jnp.int32))
        return sums.total / len(targets), ours.logits(params, hidden)

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    named = [(name, parameter.grad) for name, parameter in theirs.named_parameters()]
    wanted = params_from_transformers(_arrays(named), kind, ours)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5), gradients, wanted)


def test_bert_with_padded_keys() -> None:
    theirs = _theirs("bert")
    ours = _ours(theirs)
    params = params_from_transformers(_arrays(theirs.state_dict().items()), "bert", ours)
    tokens, mask = _tokens(), np.ones((2, LENGTH), bool)
    mask[1, 15:] = False
    expected = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.detach().numpy()
    hidden = ours.hidden(params, jnp.asarray(tokens, jnp.int32), kv_mask=jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(ours.logits(params, hidden))[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_cached_decoding(kind: str) -> None:
    theirs = _theirs(kind)
    ours = _ours(theirs)
    params = params_from_transformers(_arrays(theirs.state_dict().items()), kind, ours)
    tokens, cache, decode = _tokens(), ours.init_cache(2, LENGTH), jax.jit(ours.decode)
    expected = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        hidden, cache = decode(params, cache, jnp.asarray(tokens[:, start:stop], jnp.int32))
        np.testing.assert_allclose(ours.logits(params, hidden), expected[:, start:stop], atol=1e-5, rtol=1e-5)


def test_a_missing_entry_a_strange_one_and_a_wrong_shape_are_named() -> None:
    theirs = _theirs("llama")
    ours, state = _ours(theirs), _arrays(theirs.state_dict().items())
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ConfigError, match=f"has no {name}"):
        params_from_transformers({k: v for k, v in state.items() if k != name}, "llama", ours)
    with pytest.raises(ConfigError, match=r"no place for: model.layers.3.extra"):
        params_from_transformers({**state, "model.layers.3.extra": np.zeros(3)}, "llama", ours)
    wider = make_model(dataclasses.replace(ours.config, mlp=65), vocab_size=VOCAB, sequence_length=8, causal=True)
    with pytest.raises(ConfigError, match=r"blocks/mlp/.* must have shape"):
        params_from_transformers(state, "llama", wider)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5' cannot be read: choose from gpt2, llama, bert"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_options_without_a_counterpart_are_refused(change: dict[str, Any], message: str) -> None:
    config = transformers.LlamaConfig(**_SMALL).to_dict()
    with pytest.raises(ConfigError, match=message):
        config_from_transformers({**config, **change})
