"""The walk: what it shows of a block is what the block computes, part by part or at once, whatever the stack has."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress import hessian
from cramjax.compress.reads import later
from cramjax.compress.walk import BlockWalk
from cramjax.compress.watch import Inputs, matrix_names, watched_block
from cramjax.config import LayerConfig
from cramjax.errors import ModelError
from cramjax.experts import ExpertsConfig
from cramjax.kernels.grouped import outer_products
from cramjax.language_model import LanguageModel

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "extras": {"embedding_skip": True, "value_embeddings": True, "bigram_buckets": 16, "qk_norm": True, "bias": True},
    "pattern": {"layers": 4, "pattern": (LayerConfig(window=4), LayerConfig())},
    "post": {"norm_position": "post", "positions": "learned", "activation": "gelu_tanh", "mask_documents": True},
}
TOKENS = np.random.default_rng(0).integers(0, 300, (5, 32)).astype(np.int32)


def walked(
    model: LanguageModel, sequential: bool, change: Callable[[Any], Any]
) -> tuple[Any, dict[str, list[Any]], Any]:
    """Changed parameters, the Hessians of each matrix, and the streams after a walk that changes matrices."""
    walk = BlockWalk(model.model, jax.devices()[0], sequential)
    calibration = walk.begin(model.params, TOKENS, batch=2)
    hessians: dict[str, list[Any]] = {name: [] for name in walk.names}

    def visit(name: str, w: Any, hessian: Any) -> tuple[Any, Any]:
        hessians[name].append(np.asarray(hessian))
        return change(w), change(w)

    blocks = []
    for repeat in range(model.model.repeats):
        block = jax.tree.map(lambda leaf, repeat=repeat: np.asarray(leaf[repeat]), model.params["blocks"])
        leaves, calibration = walk.visit(block, repeat, calibration, visit)
        assert list(leaves) == list(walk.names) and calibration is not None
        paths, structure = jax.tree_util.tree_flatten_with_path(block)
        blocks.append(structure.unflatten([leaves.get(keyed(path), leaf) for path, leaf in paths]))
    params = {**model.params, "blocks": jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)}
    return params, hessians, np.concatenate(calibration.streams)


def keyed(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize(
    "kind", ["plain", "pattern", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("extras", "post"))]
)
def test_the_streams_are_those_of_the_changed_model(model_of: Callable[..., LanguageModel], kind: str) -> None:
    model = model_of(**MODELS[kind])
    params, hessians, streams = walked(model, True, lambda w: 0.9 * w)
    wanted = jax.jit(model.model.stream)(params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(streams, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    # What a matrix was calibrated on is what it is given in the changed model.
    x, context = model.model.embed(params, jnp.asarray(TOKENS))
    for repeat in range(model.model.repeats):
        block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], params["blocks"])
        x, inputs = watched_block(model.model, block, x, context, repeat, {})
        for name, own in inputs.items():
            rows = np.asarray(own.rows, float)
            np.testing.assert_allclose(hessians[name][repeat], rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)


ROUTED = ExpertsConfig(number=8, active=2, shared=1, width=24)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_programs_of_a_block_keep_to_one_choice_of_experts(
    model_of: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Scores may round otherwise in each program. Here each chooses otherwise, for all tokens."""
    model = model_of(layers=2, experts=replace(ROUTED, every=every))
    programs, own = itertools.count(), jax.lax.top_k

    def top_k(scores: Any, count: int) -> Any:
        values, chosen = own(scores, count)
        return values, (chosen + shift()) % scores.shape[-1]

    monkeypatch.setattr(jax.lax, "top_k", top_k)
    shift = lambda: next(programs)  # noqa: E731
    walk = BlockWalk(model.model, jax.devices()[0])
    calibration = walk.begin(model.params, TOKENS[:2], batch=2)
    before = next(calibration.on(walk.device))
    hessians: dict[str, Any] = {}

    def visit(name: str, w: Any, hessian: Any) -> Any:
        hessians[name] = np.asarray(hessian)
        return w, w

    block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), model.params["blocks"])
    after = walk.visit(block, 0, calibration, visit)[1]
    assert after is not None and next(programs) > 3, "as many programs chose"

    @jax.jit
    def plain(number: Any, *given: Any) -> Any:
        nonlocal shift
        shift = lambda: number  # noqa: E731
        return watched_block(model.model, *given, 0, {})

    errors = []
    for number in range(ROUTED.number):
        stream, inputs = plain(number, block, *before)
        pairs = [(after.streams[0], stream)]
        for name, each in inputs.items():
            if each.groups is not None:
                pairs.append((hessians[name], outer_products(each.rows, each.groups) / TOKENS[:2].size))
        errors.append(max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs))
    assert min(errors) < 1e-4, errors
    assert sum(error < 0.01 for error in errors) == 1, "the choices are told apart"


@pytest.mark.slow
def test_bfloat16_experts_that_are_not_changed_give_the_stream_as_it_is(model_of: Callable[..., LanguageModel]) -> None:
    experts = ExpertsConfig(number=16, active=2, width=32)
    model = model_of(layers=1, width=64, context=64, dtype="bfloat16", init_std=0.3, experts=experts)
    tokens = np.random.default_rng(0).integers(1, 300, (64, 64)).astype(np.int32)
    walk = BlockWalk(model.model, jax.devices()[0])
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), model.params["blocks"])
    after = walk.visit(block, 0, walk.begin(model.params, tokens, batch=64), lambda _, w, hessian: (w, w))[1]
    assert after is not None
    plain = np.asarray(jax.jit(model.model.stream)(model.params, tokens), float)
    errors = np.abs(np.asarray(after.streams[0], float) - plain).max(-1) / np.abs(plain).max()
    assert np.mean(errors > 0.05) < 0.02  # ties, which rounding decides in each program


def test_at_once_matrices_see_the_blocks_own_inputs(model_of: Callable[..., LanguageModel]) -> None:
    model = model_of(layers=1)
    _, before, _ = walked(model, True, lambda w: w)
    params, hessians, streams = walked(model, False, lambda w: 0.5 * w)
    for name in hessians:
        np.testing.assert_allclose(hessians[name][0], before[name][0], rtol=1e-5, atol=1e-6)
    wanted = jax.jit(model.model.stream)(params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(streams, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_matrices_are_named_in_the_order_that_they_are_read_in(model_of: Callable[..., LanguageModel]) -> None:
    own = ["attention/qkv/kernel", "attention/out/kernel", "mlp/up/kernel", "mlp/down/kernel"]
    assert list(matrix_names(model_of().model)) == own
    names = matrix_names(model_of(**MODELS["pattern"]).model)
    assert list(names) == [f"{place}/{name}" for place in (0, 1) for name in own]


def test_a_part_is_computed_from_the_inputs_of_the_part_before(model_of: Callable[..., LanguageModel]) -> None:
    """A block walked part by part costs little more than one pass: attention, for example, runs once."""
    model = model_of()
    walk = BlockWalk(model.model, jax.devices()[0])
    x, context = model.model.embed(model.params, jnp.asarray(TOKENS))
    block = jax.tree.map(lambda leaf: leaf[0], model.params["blocks"])
    seen = watched_block(model.model, block, x, context, 0, {})[1]
    known = {name: own.rows for name, own in seen.items()}

    def products(name: str, given: dict[str, Any]) -> int:
        def inputs(block: Any, x: Any, known: Any) -> Any:
            return watched_block(model.model, block, x, context, 0, known)[1][name].rows

        return jax.jit(inputs).lower(block, x, given).compile().as_text().count(" dot(")

    assert walk.names[3] == "mlp/down/kernel"
    assert products("mlp/down/kernel", {}) > products("mlp/down/kernel", {"mlp/up/kernel": known["mlp/up/kernel"]})
    assert products("mlp/up/kernel", {name: known[name] for name in walk.names[:2]}) == 1  # of `out` alone


def test_inputs_are_kept_while_they_are_read(model_of: Callable[..., LanguageModel]) -> None:
    qkv, out, up, down = (f"{name}/kernel" for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down"))
    for kind, options in (("plain", MODELS["plain"]), ("post", MODELS["post"])):
        every = BlockWalk(model_of(**options).model, jax.devices()[0]).programs
        assert [reads.known for reads in every] == [set(), {qkv}, {out}, {up}, {out, down}], kind
        assert [reads.matrices for reads in every] == [set(), {qkv}, {out}, {up}, {out, down}], kind
        assert later(every)[1:] == [{out, up, down}, {out, up, down}, {out, down}, set()]
    part = BlockWalk(model_of().model, jax.devices()[0], only="mlp/*").programs
    assert [reads.matrices for reads in part] == [{qkv, out}, {up}, {qkv, out, down}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hessians_are_means_of_outer_products(dtype: str) -> None:
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300, 410)) + 0.5, dtype)  # two stretches of columns
    first, second = ({"w": Inputs(own)} for own in rows)
    sums = hessian.added(hessian.added({"w": hessian.empty(first["w"])}, first), second)
    found = np.asarray(hessian.means(sums["w"], np.float32(600)))
    exact = np.asarray(rows, np.float64).reshape(600, 410)
    np.testing.assert_allclose(found, exact.T @ exact / 600, rtol=0, atol=2e-6 * 600**0.5)  # of sums in float32
    np.testing.assert_array_equal(found, found.T)


def test_inputs_that_are_not_finite_are_named(model_of: Callable[..., LanguageModel]) -> None:
    model = model_of()
    up = model.params["blocks"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[1].set(3e38)
    with pytest.raises(ModelError, match="block 1: the inputs of mlp/down/kernel are not finite in float32"):
        walked(model, True, lambda w: w)
