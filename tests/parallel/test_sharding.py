"""The sharding table on trees named as the model names them, and that sharding changes no numbers."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from cramjax.config import ModelConfig, OptimConfig
from cramjax.kernels.packed import low_rank, normal_float, scaled
from cramjax.model import Weight, make_model
from cramjax.model.weights import Constant
from cramjax.optim import make_optimizer
from cramjax.parallel import batch_sharding, make_mesh, param_shardings, replicated, sharding

MODEL = ModelConfig(
    layers=2, width=32, heads=4, mlp=64, tied=False, bias=True, value_embeddings=True, bigram_buckets=128,
    head_transform=True, embedding_skip=True, positions="learned", token_types=2,
)  # fmt: skip


_MLP = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}


def _kernel(*axes: str) -> Weight:
    """A matrix of blocks whose sizes do not matter."""
    return Weight((1, 1), axes, "matrix", Constant(0.0), repeats=1)


def flatten(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}


def specs(tree):
    return {path: sharding.spec for path, sharding in flatten(tree).items()}


@pytest.fixture(scope="module")
def model():
    return make_model(MODEL, vocab_size=128, sequence_length=16, causal=True, separator_id=0)


@pytest.fixture(scope="module")
def abstract(model):
    return model.abstract_params()


def test_every_parameter_of_two_axes_or_more_is_shared_on_its_largest_axis(model, abstract):
    mesh = make_mesh(2, 4)
    got = specs(param_shardings(mesh, abstract, model.weights))
    assert got == {path: P() for path in got} | {
        "embed/token/table": P("fsdp", None),
        "embed/bigram/table": P("fsdp", None),
        "embed/position/table": P(None, "fsdp"),
        "embed/token_type/table": P(None, "fsdp"),
        "embed/value/table": P(None, "fsdp", None),
        "blocks/attention/qkv/kernel": P(None, None, "fsdp"),
        "blocks/attention/out/kernel": P(None, "fsdp", None),
        "blocks/mlp/up/kernel": P(None, None, "fsdp"),
        "blocks/mlp/down/kernel": P(None, "fsdp", None),
        "head/transform/dense/kernel": P("fsdp", None),
        "head/decoder/kernel": P(None, "fsdp"),
    }


def test_the_table_names_every_table_and_kernel_of_the_model(model, abstract):
    for path, spec in specs(param_shardings(make_mesh(2, 4), abstract, model.weights)).items():
        assert (path.rsplit("/", 1)[-1] in ("table", "kernel")) == (spec != P()), path


def test_without_fsdp_everything_is_replicated(model, abstract):
    assert set(specs(param_shardings(make_mesh(8, 1), abstract, model.weights)).values()) == {P()}


@pytest.mark.parametrize("name", ["adamw", "muon", "adan", "sophia", "adafactor", "schedule_free_adamw"])
def test_optimizer_state_is_shared_like_its_parameters(name, model, abstract):
    mesh = make_mesh(2, 4)
    optimizer = make_optimizer(OptimConfig(name=name, ema=0.0 if "free" in name else 0.9), model.weights)
    state = jax.eval_shape(optimizer.init, abstract)
    wanted, got = (
        specs(param_shardings(mesh, abstract, model.weights)),
        specs(param_shardings(mesh, state, model.weights)),
    )
    shapes = {path: x.shape for path, x in flatten(abstract).items()}
    copies = 0
    for path, leaf in flatten(state).items():
        owner = [p for p in wanted if path.endswith("/" + p)]
        if owner and leaf.shape == shapes[owner[0]]:
            copies += 1
            assert got[path] == wanted[owner[0]], path
        else:
            assert got[path] == P(), path
    # At least an average or z for each parameter.
    assert copies >= len(wanted)


def test_parts_that_cannot_be_shared_alike_are_each_by_itself(model, abstract):
    """Of any rank: the thin matrices of an adapter are divided where their base is wide, and so is the base."""
    mesh = make_mesh(2, 4)
    make = {
        "up": lambda w: low_rank(normal_float(w, 16), 3, scale=1.0, key=jax.random.key(0), dora=True),
        "down": lambda w: scaled(w, inputs=True, start=2),
    }
    mlp = {name: {"kernel": jax.eval_shape(make[name], abstract["blocks"]["mlp"][name]["kernel"])} for name in make}
    got = {
        path.removeprefix("blocks/mlp/").replace("/kernel", ""): spec
        for path, spec in specs(param_shardings(mesh, {"blocks": {"mlp": mlp}}, model.weights)).items()
    }
    assert got == {
        "up/base/nf4": P(None, None, "fsdp"),
        "up/base/absmax": P(None, None, "fsdp"),
        "up/base/absmax_scale": P(),  # one number
        "up/base/absmax_mean": P(),
        "up/a": P(None, "fsdp", None),
        "up/b": P(None, None, "fsdp"),
        "up/magnitude": P(None, None, "fsdp"),
        "down/base": P(None, "fsdp", None),
        "down/inputs": P(None, "fsdp", None),
        "down/outputs": P(),  # of 30 columns
    }


def test_an_axis_that_does_not_divide_yields_to_the_next_and_then_to_replication(caplog):
    sharding._warn_once.cache_clear()
    mesh = make_mesh(2, 4)
    tree = {
        "params": {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 8, 30), jnp.float32)}}}},
        "mu": {"blocks": {"mlp": {"down": {"kernel": jax.ShapeDtypeStruct((3, 30, 10), jnp.float32)}}}},
        "nu": {"blocks": {"mlp": {"down": {"kernel": jax.ShapeDtypeStruct((3, 30, 10), jnp.float32)}}}},
    }
    weights = {"blocks": {"mlp": {name: {"kernel": _kernel(*axes)} for name, axes in _MLP.items()}}}
    with caplog.at_level(logging.WARNING):
        first, second = (param_shardings(mesh, tree, weights) for _ in range(2))
    assert first == second
    assert first["params"]["blocks"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", None)
    assert first["mu"]["blocks"]["mlp"]["down"]["kernel"].spec == P()
    assert [r.getMessage() for r in caplog.records if "replicated" in r.getMessage()] == [
        "blocks/mlp/down/kernel of shape (3, 30, 10) is replicated: none of its axes is a multiple of train.fsdp=4. "
        "Each device holds all of it; choose a width or vocabulary that 4 divides to share it."
    ]


def test_layers_are_never_shared_out():
    tree = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((64, 8, 8), jnp.float32)}}}}
    weights = {"blocks": {"mlp": {"up": {"kernel": _kernel("embed", "mlp")}}}}
    assert specs(param_shardings(make_mesh(2, 4), tree, weights)) == {"blocks/mlp/up/kernel": P(None, "fsdp", None)}


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4), (1, 8)])
def test_sequences_are_shared_out_over_all_devices(data, fsdp):
    tokens = jax.device_put(np.arange(16 * 3).reshape(16, 3), batch_sharding(make_mesh(data, fsdp)))
    assert [shard.data.shape for shard in tokens.addressable_shards] == [(2, 3)] * 8
    assert len({str(shard.index) for shard in tokens.addressable_shards}) == 8


def test_replicated_is_whole_everywhere():
    x = jax.device_put(np.arange(5), replicated(make_mesh(2, 4)))
    assert [shard.data.shape for shard in x.addressable_shards] == [(5,)] * 8


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_steps_equal_steps_on_one_device(name, data, fsdp):
    """A linear model in the shape of one block; sums over devices differ from sums on one by float32 rounding."""
    rng = np.random.default_rng(0)
    shapes = {"up": {"kernel": (2, 16, 32)}, "down": {"kernel": (2, 32, 16)}}
    draw = lambda s: jnp.asarray(rng.standard_normal(s) / 4, jnp.float32)  # noqa: E731
    params = {"blocks": {"mlp": jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))}}
    weights = {"blocks": {"mlp": {name: {"kernel": _kernel(*axes)} for name, axes in _MLP.items()}}}
    batch = rng.standard_normal((16, 16)).astype(np.float32)
    optimizer = make_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.1, schedule="constant"), weights)

    def loss(params, x):
        for layer in range(2):
            mlp = jax.tree.map(lambda w, layer=layer: w[layer], params["blocks"]["mlp"])
            x = x + jax.nn.relu(x @ mlp["up"]["kernel"]) @ mlp["down"]["kernel"]
        return jnp.mean(x**2)

    def step(carry, x):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, x)
        return optimizer.update(grads, state, params, 0.1)[:2], value

    def losses(mesh):
        carry = jax.tree.map(np.asarray, (params, optimizer.init(params)))  # donated below, so each run has its own
        shardings = param_shardings(mesh, carry, weights)
        carry, x = jax.device_put(carry, shardings), jax.device_put(batch, batch_sharding(mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        values = []
        for _ in range(4):
            carry, value = jitted(carry, x)
            values.append(float(value))
        assert jax.tree.map(lambda a: a.sharding, carry) == shardings
        return values

    one = losses(make_mesh(1, 1, jax.devices()[:1]))
    np.testing.assert_allclose(losses(make_mesh(data, fsdp)), one, rtol=2e-4)
    assert one[-1] < 0.9 * one[0]
