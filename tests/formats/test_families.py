"""Every family as a configuration of our block, against `transformers`: logits and all gradients in float32."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ModelError
from cramjax.formats.families import family_of, read_architecture
from cramjax.formats.family import Architecture, read_rope
from cramjax.formats.table import read_params
from cramjax.formats.tensors import ArrayTensors
from cramjax.model import Model, make_model

from .models import GROUPED, LENGTH, MODELS, VOCAB, arrays, theirs, tokens

_EXTRA = "needs the `parity` extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=_EXTRA)
transformers = pytest.importorskip("transformers", reason=_EXTRA)


def _ours(their: Any, **options: Any) -> Model:
    read: Architecture = read_architecture(their.config.to_dict())
    arguments = {"vocab_size": VOCAB, "sequence_length": LENGTH, "causal": read.kind == "causal"}
    return make_model(read.config, **(arguments | options))


def _params(state: dict[str, np.ndarray], config: dict[str, Any], model: Model) -> Any:
    family = family_of(config)
    table = family.table(config)
    tensors = family.view(ArrayTensors(state))
    return read_params(tensors, table, model, ignored=family.ignored, prefix=family.prefix)


def _state(their: Any) -> dict[str, np.ndarray]:
    return arrays(their.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_logits(kind: str) -> None:
    their = theirs(kind)
    ours = _ours(their)
    params = _params(_state(their), their.config.to_dict(), ours)
    with torch.no_grad():
        expected = their(input_ids=torch.tensor(tokens())).logits.numpy()
    hidden = jax.jit(ours.hidden)(params, jnp.asarray(tokens(), jnp.int32))
    np.testing.assert_allclose(ours.logits(params, hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_logits_and_gradients(kind: str, layer_loop: str) -> None:
    their = theirs(kind)
    ours = _ours(their, layer_loop=layer_loop)
    config = their.config.to_dict()
    params = _params(_state(their), config, ours)
    seen, targets = tokens(), np.random.default_rng(1).integers(0, VOCAB, 2 * LENGTH)

    expected = their(input_ids=torch.tensor(seen)).logits
    torch.nn.functional.cross_entropy(expected.reshape(-1, VOCAB), torch.tensor(targets)).backward()

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = ours.hidden(params, jnp.asarray(seen, jnp.int32))
        sums = ours.loss_sums(params, hidden.reshape(2 * LENGTH, -1), jnp.asarray(targets, jnp.int32))
        return sums.total / len(targets), ours.logits(params, hidden)

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    named = [(name, parameter.grad) for name, parameter in their.named_parameters()]
    wanted = _params(arrays(named), config, ours)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5), gradients, wanted)


def test_bert_with_padded_keys_and_types_of_tokens() -> None:
    their = theirs("bert")
    ours = _ours(their)
    params = _params(_state(their), their.config.to_dict(), ours)
    seen, mask, types = tokens(), np.ones((2, LENGTH), bool), np.zeros((2, LENGTH), np.int64)
    mask[1, 15:] = False
    types[:, 10:] = 1
    given = {"attention_mask": torch.tensor(mask), "token_type_ids": torch.tensor(types)}
    expected = their(input_ids=torch.tensor(seen), **given).logits.detach().numpy()
    inputs = {"kv_mask": jnp.asarray(mask), "token_types": jnp.asarray(types, jnp.int32)}
    hidden = ours.hidden(params, jnp.asarray(seen, jnp.int32), **inputs)
    np.testing.assert_allclose(np.asarray(ours.logits(params, hidden))[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "nanochat"])
def test_cached_decoding(kind: str) -> None:
    their = theirs(kind)
    ours = _ours(their)
    params = _params(_state(their), their.config.to_dict(), ours)
    seen, cache, decode = tokens(), ours.init_cache(2, LENGTH), jax.jit(ours.decode)
    expected = their(input_ids=torch.tensor(seen)).logits.detach().numpy()
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        hidden, cache = decode(params, cache, jnp.asarray(seen[:, start:stop], jnp.int32))
        np.testing.assert_allclose(ours.logits(params, hidden), expected[:, start:stop], atol=1e-5, rtol=1e-5)


def test_a_missing_entry_a_strange_one_and_a_wrong_shape_are_named() -> None:
    their = theirs("llama")
    ours, state, config = _ours(their), _state(their), their.config.to_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=f"have no tensor {name}"):
        _params({k: v for k, v in state.items() if k != name}, config, ours)
    with pytest.raises(ModelError, match=r"no place for: model.layers.3.extra"):
        _params({**state, "model.layers.3.extra": np.zeros(3)}, config, ours)
    with pytest.raises(ModelError, match=f"the tensor {name} is stored as int8"):
        _params({**state, name: state[name].astype(np.int8)}, config, ours)
    wider = make_model(dataclasses.replace(ours.config, mlp=65), vocab_size=VOCAB, sequence_length=8, causal=True)
    with pytest.raises(
        ModelError, match=r"down_proj.weight must have shape \(48, 65\) for blocks/mlp/.*got \(48, 64\)"
    ):
        _params(state, config, wider)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5' cannot be read .*: choose from gpt2, llama, .*bert"),
        ({"model_type": "lama"}, "'lama' cannot be read; near it are llama"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "type 'longrope'"),
        ({"attention_bias": True}, "mlp_bias=False"),
        ({"num_attention_heads": 5}, "must be a multiple of model.heads|must divide"),
        ({"hidden_size": "wide"}, "must give hidden_size as a number; it is 'wide'"),
        ({"num_hidden_layers": 0}, "layers must be at least 1"),
    ],
)
def test_options_without_a_counterpart_are_refused(change: dict[str, Any], message: str) -> None:
    config = transformers.LlamaConfig(**GROUPED).to_dict()
    config.pop("head_dim", None)
    with pytest.raises(ModelError, match=message):
        read_architecture({**config, **change})


def test_files_of_the_first_years() -> None:
    """GPT-2 without its prefix and with buffers of its mask; BERT with `gamma` and `beta`."""
    gpt2 = theirs("gpt2")
    ours, config = _ours(gpt2), gpt2.config.to_dict()
    state = _state(gpt2)
    old = {name.removeprefix("transformer."): array for name, array in state.items() if name != "lm_head.weight"}
    old["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.bool_)
    jax.tree.map(np.testing.assert_array_equal, _params(old, config, ours), _params(state, config, ours))

    bert = theirs("bert")
    state, config = _state(bert), bert.config.to_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in state.items()
    }
    ours = _ours(bert)
    jax.tree.map(np.testing.assert_array_equal, _params(old, config, ours), _params(state, config, ours))


def test_every_family_is_tried() -> None:
    from cramjax.formats.families import FAMILIES

    tried = {theirs_.config.model_type for theirs_ in map(theirs, MODELS)}
    assert tried == set(FAMILIES)


def test_yarn_without_a_factor_is_the_ratio_of_contexts() -> None:
    """As `transformers` has it, whose frequencies are the same as with the ratio written out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = {**sizes, "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": None}}
    base, scaling = read_rope(config, 10_000.0)
    assert scaling is not None and (scaling.factor, scaling.original_positions) == (4.0, 16)
    written = {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": 16}
    ours, theirs = (
        ROPE_INIT_FUNCTIONS["yarn"](transformers.LlamaConfig(**fields, rope_theta=base), "cpu")
        for fields in ({**sizes, "rope_scaling": written}, config)
    )
    assert ours[0].tolist() == theirs[0].tolist() and ours[1] == theirs[1]
    with pytest.raises(ModelError, match="type 'linear' need a factor"):
        read_rope({"rope_scaling": {"rope_type": "linear"}}, 10_000.0)
