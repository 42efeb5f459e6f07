"""`crammed-bert` is crammed BERT: the facts of Geiping & Goldstein (2022), as last revised by its authors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from cramjax.budget import Budget
from cramjax.config import RunConfig
from cramjax.model import Model, count_parameters, make_model
from cramjax.model.objectives import mask_tokens
from cramjax.optim import batch_size_at
from cramjax.optim.groups import path_name, peak_rate, weight_decay
from cramjax.optim.schedule import schedule
from cramjax.recipes import load_recipe

_VOCAB = 32768


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_recipe("crammed-bert")


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Model:
    length = config.data.sequence_length
    return make_model(config.model, vocab_size=_VOCAB, sequence_length=length, causal=False, separator_id=0)


@pytest.fixture(scope="module")
def params(model: Model) -> PyTree:
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter."""
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(model.abstract_params())}


def test_16_layers_of_width_768_with_12_heads(config: RunConfig):
    assert (config.model.layers, config.model.width, config.model.heads) == (16, 768, 12)
    assert config.model.kv_heads is None and config.model.head_dim is None


def test_mlp_goes_768_to_3072_split_in_two_and_back_from_1536(config: RunConfig, shapes: dict[str, tuple[int, ...]]):
    assert config.model.activation == "geglu"
    assert shapes["blocks/mlp/up/kernel"] == (16, 768, 3072)
    assert shapes["blocks/mlp/down/kernel"] == (16, 1536, 768)


def test_mlp_is_gelu_of_gate_times_x(model: Model, params: PyTree):
    block = jax.tree.map(lambda p: p[0], params["blocks"])
    block["attention"] = jax.tree.map(jnp.zeros_like, block["attention"])
    x, context = model.embed(params, jnp.arange(4)[None])
    out = model.block(block, x, context, 0)

    x = np.asarray(x, np.float64)
    up, down = (np.asarray(block["mlp"][name]["kernel"], np.float64) for name in ("up", "down"))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    gate, value = np.split(normed @ up, 2, axis=-1)
    gelu = gate / 2 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    np.testing.assert_allclose(out, x + (gelu * value) @ down, atol=2e-5)  # float32 sums of up to 1536 terms


def test_pre_layernorm_with_eps_1e_12_weight_and_bias(config: RunConfig, shapes: dict[str, tuple[int, ...]]):
    assert (config.model.norm, config.model.norm_position, config.model.norm_eps) == ("layernorm", "pre", 1e-12)
    for norm in ("attention_norm", "mlp_norm"):
        assert shapes[f"blocks/{norm}/weight"] == shapes[f"blocks/{norm}/bias"] == (16, 768)


def test_a_norm_after_the_embedding_and_a_final_one(shapes: dict[str, tuple[int, ...]]):
    for norm in ("embed/norm", "head/norm"):
        assert shapes[f"{norm}/weight"] == shapes[f"{norm}/bias"] == (768,)


def test_no_bias_in_any_linear_layer(shapes: dict[str, tuple[int, ...]]):
    assert {path for path in shapes if path.endswith("bias") and "norm" not in path} == set()


def test_qkv_is_fused(shapes: dict[str, tuple[int, ...]]):
    assert shapes["blocks/attention/qkv/kernel"] == (16, 768, 3 * 768)


def test_head_transform_skipped_and_decoder_tied(config: RunConfig, shapes: dict[str, tuple[int, ...]]):
    assert not config.model.head_transform and config.model.tied
    assert {path for path in shapes if path.startswith("head/")} == {"head/norm/weight", "head/norm/bias"}


def test_positions_are_sinusoids_times_one_scalar_initialised_to_width_to_the_minus_half(params: PyTree):
    positions = params["embed"]["position"]
    assert jax.tree.map(float, positions) == {"scale": pytest.approx(768**-0.5, rel=1e-6)}


def test_no_dropout(config: RunConfig):
    assert config.model.dropout == 0


def test_initialised_from_a_normal_of_0_02(params: PyTree):
    for leaf in (params["embed"]["token"]["table"], params["blocks"]["mlp"]["down"]["kernel"]):
        assert float(jnp.mean(leaf)) == pytest.approx(0, abs=1e-4)
        assert float(jnp.std(leaf)) == pytest.approx(0.02, rel=0.01)


def test_sequences_of_128(config: RunConfig):
    assert config.data.sequence_length == 128


def test_wordpiece_of_32768_trained_on_the_data_lower_cased_ascii(config: RunConfig):
    assert (config.tokenizer.kind, config.tokenizer.vocab_size) == ("wordpiece", _VOCAB)
    assert config.data.normalize == "ascii_lower"


def test_119_6_million_parameters_94_4_in_blocks_25_2_in_the_embedding(
    config: RunConfig, shapes: dict[str, tuple[int, ...]]
):
    count = count_parameters(config.model, _VOCAB, config.data.sequence_length)
    assert round(count.total / 1e6, 1) == 119.6
    assert round(count.blocks / 1e6, 1) == 94.4
    assert round(count.embedding / 1e6, 1) == 25.2
    assert count.total == sum(int(np.prod(shape)) for shape in shapes.values())


def test_masked_objective_at_exactly_a_quarter_of_positions_80_10_10(config: RunConfig):
    assert (config.objective.kind, config.objective.mask_rate, config.objective.mask_rate_end) == ("masked", 0.25, None)
    true = jax.random.randint(jax.random.key(0), (512, 128), 5, _VOCAB)
    rate = config.objective.mask_rate
    masked = mask_tokens(true, jax.random.key(1), rate, mask_rate_max=rate, mask_id=1, vocab_size=_VOCAB, keep_id=None)
    positions = np.asarray(masked.positions)
    assert positions.shape == (512, round(0.25 * 128))
    assert all(len(set(row)) == 32 for row in positions)
    seen = np.take_along_axis(np.asarray(masked.tokens), positions, 1)
    original = np.take_along_axis(np.asarray(true), positions, 1)
    # 16384 draws: a share is off by 0.01 with three standard deviations.
    assert np.mean(seen == 1) == pytest.approx(0.8, abs=0.01)
    assert np.mean(seen == original) == pytest.approx(0.1, abs=0.01)


def test_no_attention_mask_over_packed_sequences(config: RunConfig):
    assert not config.model.mask_documents and config.model.window is None


def test_adamw(config: RunConfig):
    optim = config.optim
    assert (optim.name, optim.lr, optim.beta1, optim.beta2, optim.eps) == ("adamw", 1e-3, 0.9, 0.98, 1e-12)
    assert (optim.embed_lr, optim.head_lr, optim.scalar_lr) == (None, None, None)
    assert (optim.clip, optim.ema) == (0.5, 0)
    assert peak_rate(optim, "embedding") == peak_rate(optim, "matrix") == peak_rate(optim, "scalar") == 1e-3


def test_weight_decay_0_01_of_matrices_and_the_tied_embedding_but_not_of_norms(config: RunConfig, model: Model):
    weights = {path_name(path): weight for path, weight in jax.tree.leaves_with_path(model.weights)}
    decay = {path: weight_decay(config.optim, weight.role) for path, weight in weights.items()}
    assert decay["embed/token/table"] == 0.01
    assert all(decay[path] == 0.01 for path in weights if path.endswith("kernel"))
    assert all(decay[path] == 0 for path in weights if "norm" in path or path.endswith("scale"))


def test_learning_rate_is_peak_times_min_of_a_quarter_plus_x_and_4_times_1_minus_x_without_warm_up(config: RunConfig):
    assert config.optim.warmup == 0
    multiplier = schedule(config.optim)
    for x in np.linspace(0, 1, 41):
        assert float(multiplier(x)) == pytest.approx(min(0.25 + x, 4 * (1 - x)), abs=1e-6)


def test_batch_ramps_linearly_to_8192_at_60_percent(config: RunConfig):
    microbatch = config.batch.microbatch or config.batch.size
    assert (config.batch.size, config.batch.ramp) == (8192, 0.6)
    for x in np.linspace(0, 1, 41):
        assert batch_size_at(config.batch, float(x)) == pytest.approx(8192 * min(1, x / 0.6), abs=microbatch)


def test_24_hours_with_a_microbatch_of_a_16_gb_card(config: RunConfig):
    assert Budget.parse(config.budget) == Budget(24 * 3600, "seconds")
    assert config.batch.microbatch == 128  # A4000; 96 on a 2080 Ti and 512 on an A6000
    load_recipe("crammed-bert", ["batch.microbatch=512"])
    load_recipe("crammed-bert", ["batch.microbatch=96", "batch.size=8160"])


def test_documents_of_more_than_a_quarter_token_per_character_are_dropped(config: RunConfig):
    assert config.data.max_tokens_per_char == 0.25


def test_sequences_are_sorted_by_sentence_length_not_shuffled(config: RunConfig):
    assert config.data.order == "sentence_length"
