"""Parameters that are not trained: beside the others in the state, and left as they are, bit for bit."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from cramjax.errors import ConfigError, RunInterruptedError
from cramjax.evaluation import evaluate_text
from cramjax.kernels.packed import is_packed, pack, unpacked
from cramjax.model import make_model, objective_for
from cramjax.optim import make_optimizer
from cramjax.parallel import batch_sharding, make_mesh, on_mesh, zero_shardings
from cramjax.planning import estimate_memory
from cramjax.planning.steps import vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.serve import generate
from cramjax.training import load_run, resume, train
from cramjax.training.checkpoint import CheckpointWriter, Meta, list_checkpoints, restore
from cramjax.training.display import QuietDisplay
from cramjax.training.frozen import merged, split, untrained
from cramjax.training.parts import build_model, optimizer_for
from cramjax.training.step import Batch, State, evaluation_params, initial_state, make_step, state_shardings

Tiny = Callable[..., RunConfig]

MODEL = ModelConfig(layers=2, width=32, heads=4, mlp=64, norm="rmsnorm", tied=False)
TOKENS = np.random.default_rng(0).integers(0, 64, (1, 8, 17)).astype(np.int32)
STEADY = OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1, clip=None)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}


def assert_same(a: Any, b: Any) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, array in a.items():
        np.testing.assert_array_equal(array, b[path], err_msg=path)


def model_of(kind: Any = "causal") -> Any:
    return make_model(MODEL, vocab_size=64, sequence_length=16, causal=kind == "causal", layer_loop="scan")


def declared(params: Any) -> Any:
    """Declarations of the parameters that are there."""
    return jax.tree.map(
        lambda leaf, weight: None if leaf is None else weight,
        params,
        model_of().weights,
        is_leaf=lambda leaf: leaf is None,
    )


def trained(
    params: Any, freeze: tuple[str, ...], config: OptimConfig = STEADY, steps: int = 2, mesh: Any = None
) -> tuple[Callable[[State, int], State], State]:
    """A function that takes steps on a mesh, and a state after some of them."""
    model, mesh = model_of(), mesh or make_mesh(1, 1, jax.devices()[:1])
    like = jax.eval_shape(lambda: params)
    optimizer = make_optimizer(config, declared(split(like, freeze)[0]))
    objective = objective_for(ObjectiveConfig(), model, mask_id=None)
    abstract = jax.eval_shape(lambda p: initial_state(p, optimizer, 0, freeze), like)
    shardings = state_shardings(mesh, abstract, model.weights, 3)
    shared = None if mesh.size == 1 else zero_shardings(mesh, abstract.params, model.weights, 3)
    step = jax.jit(on_mesh(mesh, make_step(objective, optimizer, shared)), out_shardings=(shardings, None))
    tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec)))
    batch = Batch(tokens, np.int32(1))  # pyright: ignore[reportArgumentType]

    def go(state: State, count: int) -> State:
        for _ in range(count):
            state, metrics = step(state, batch, np.float32(0.5))
            assert metrics.finite
        return state

    return go, go(jax.device_put(initial_state(params, optimizer, 0, freeze), shardings), steps)


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "muon",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("schedule_free_adamw", "sophia", "adafactor")),
    ],
)
def test_the_others_train_as_if_nothing_were_frozen(name: Any) -> None:
    """One step of an optimizer that treats each parameter alone, without a bound on the norm of all of them."""
    params = model_of().init(jax.random.key(0))
    config = replace(STEADY, name=name, ema=0.0 if name == "schedule_free_adamw" else 0.9, ema_start=0.0)
    patterns = ("embed/*", "blocks/mlp/up/kernel", "*norm*")
    _, whole = trained(params, (), config, steps=1)
    _, state = trained(params, patterns, config, steps=1)
    before = leaves(params)
    frozen = {p for p in before if p.startswith("embed/") or p == "blocks/mlp/up/kernel" or "norm" in p}
    assert set(leaves(state.frozen)) == frozen and set(leaves(state.params)) == set(before) - frozen
    assert_same(state.frozen, split(params, patterns)[1])
    changed = leaves(whole.params)
    for path, array in leaves(state.params).items():
        # The gradient of fewer parameters is another program, whose sums may be rounded in another order.
        np.testing.assert_allclose(array, changed[path], rtol=2e-4, atol=2e-5, err_msg=path)
        assert not np.array_equal(array, before[path])
    used = evaluation_params(state, make_optimizer(config, declared(state.params)))
    assert leaves(used).keys() == before.keys()
    # Nothing of the optimizer's state has the size of what is frozen.
    sizes = {before[path].size for path in frozen} - {before[path].size for path in set(before) - frozen}
    assert sizes and not sizes & {array.size for array in leaves(state.optimizer).values()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 4)])
def test_packed_matrices_stay_while_the_rest_is_trained_saved_and_goes_on(
    tmp_path: Path, bits: int, data: int, fsdp: int
) -> None:
    params = model_of().init(jax.random.key(0))
    packed = pack(params, model_of().weights, f"int{bits}", 8)
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    go, state = trained(packed, ("head/*",), mesh=mesh)
    frozen = leaves(state.frozen)
    assert {p for p in frozen if p.endswith(".q") or p.endswith("/q")} and "head/decoder/kernel" in frozen
    assert_same(state.frozen, split(packed, ("head/*",))[1])
    # The same losses and updates as with the arrays that the packed matrices stand for, frozen.
    arrays = jax.tree.map(unpacked, packed, is_leaf=is_packed)
    _, reference = trained(arrays, ("blocks/*/kernel", "head/*"))
    wanted = leaves(reference.params)
    for path, array in leaves(state.params).items():
        np.testing.assert_allclose(array, wanted[path], rtol=2e-4, atol=2e-5, err_msg=path)

    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(state, Meta(2, 0, {}, "", "", 0.5, "", None))
    writer.wait()
    back = restore(list_checkpoints(tmp_path)[0], state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_same(back, state)
    assert_same(go(back, 2), go(state, 2))


def test_parts_of_packed_matrices_are_shared_like_the_matrix() -> None:
    params = model_of().init(jax.random.key(0))
    mesh = make_mesh(2, 4)

    def specs(tree: Any) -> dict[str, Any]:
        flat = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x.spec for path, x in flat}

    for bits, group in ((8, 8), (4, 8), (4, None)):
        packed = pack(params, model_of().weights, f"int{bits}", group, symmetric=False)
        state = State(jnp.zeros(()), {}, {}, jnp.zeros(2), packed)  # pyright: ignore[reportArgumentType]
        got = specs(state_shardings(mesh, jax.eval_shape(lambda state=state: state), model_of().weights, 3).frozen)
        for name, axis in (("attention/qkv", 2), ("attention/out", 1), ("mlp/up", 2), ("mlp/down", 1)):
            # One scale a column cannot be divided along the inputs: then all parts are along the outputs.
            axis = 2 if group is None else axis
            wanted = jax.P(*("fsdp" if i == axis else None for i in range(3)))
            parts = {part: got[f"blocks/{name}/kernel/{part}"] for part in ("q", "scale", "zero")}
            assert parts == dict.fromkeys(parts, wanted), (name, bits, group)
        placed = jax.device_put(packed, state_shardings(mesh, state, model_of().weights, 3).frozen)
        whole, own = (sum(x.nbytes for x in jax.tree.leaves(placed["blocks"]["mlp"])), 0)
        for leaf in jax.tree.leaves(placed["blocks"]["mlp"]):
            own += leaf.addressable_shards[0].data.nbytes
        assert own == whole // 4
        # With zero=2, each device holds all parameters.
        assert set(specs(state_shardings(mesh, state, model_of().weights, 2).frozen).values()) == {jax.P()}


def test_splits_come_together_again() -> None:
    params = {"a": {"x": jnp.ones(2), "y": jnp.zeros(3)}, "b": jnp.ones(())}
    assert split(params, ()) == (params, ()) and merged(params, ()) is params
    some, others = split(params, ["a/y", "b"])
    assert list(leaves(some)) == ["a/x"] and list(leaves(others)) == ["a/y", "b"]
    assert_same(merged(some, others), params)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("embed/*", "block/*"), r"no parameter's path matches 'block/\*'.* the paths are .*blocks/mlp/up/kernel"),
        (("*",), r"train.freeze=\['\*'\] leaves no parameter to be trained"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_said(patterns: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        untrained(model_of(), patterns)


@pytest.mark.parametrize("options", [["--optim.name=lomo"], ["--optim.name=adamw", "--train.offload_optimizer=true"]])
def test_methods_that_update_every_block_refuse(options: list[str]) -> None:
    plain = ["--optim.ema=0", "--batch.ramp=0", "--batch.microbatch=null"]
    load_recipe("quickstart", [*plain, *options])
    with pytest.raises(ConfigError, match=r"train.freeze is \['embed/\*'\], but .* leave one out"):
        load_recipe("quickstart", [*plain, *options, "--train.freeze=[embed/*]"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_plans_count_what_is_trained(name: str) -> None:
    config = load_recipe("gpt-124m", [f"--optim.name={name}", "--train.freeze=[embed/*,blocks/mlp/*]"])
    vocabulary = vocabulary_of(config)
    model = build_model(config, vocabulary)

    def create() -> State:
        params = model.init(jax.random.key(0))
        return initial_state(params, optimizer_for(config, model), 0, config.train.freeze)

    state = jax.eval_shape(create)
    sizes = {"vocab_size": vocabulary.vocab_size, "compute_dtype": "bfloat16", "gpu": None}
    memory = estimate_memory(config, **sizes).by_kind

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert memory["weights"] == size(state.params) + size(state.frozen)
    assert memory["optimizer"] == pytest.approx(size(state.optimizer), rel=0.02, abs=1 << 20)
    whole = estimate_memory(replace(config, train=replace(config.train, freeze=())), **sizes)
    assert memory["optimizer"] < whole.by_kind["optimizer"] / 2


class StopAt(QuietDisplay):
    """Sends this process SIGTERM when a record of the given step is shown."""

    def __init__(self, step: int):
        super().__init__()
        self.step, self.sent = step, False

    def record(self, record: Any) -> None:
        if record["step"] >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_run_with_frozen_parts_resumes_exactly_and_keeps_them(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train__freeze=("embed/*", "blocks/attention/*"))
    whole = train(config, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "parts", display=StopAt(11))
    again = resume(tmp_path / "parts")
    assert_same(again.params, whole.params)
    assert_same(load_run(tmp_path / "parts").params, whole.params)
    assert again.summary["bits_per_byte"] == whole.summary["bits_per_byte"]
    start = leaves(whole.model.init(jax.random.key(config.seed)))
    for path, array in leaves(whole.params).items():
        frozen = path.startswith(("embed/", "blocks/attention/"))
        # Drawn by another program, which may round in another place.
        assert np.allclose(array, start[path], rtol=0, atol=1e-6) == frozen, path


@pytest.mark.slow
def test_a_trained_model_of_8_bits_scores_and_writes_as_its_float_original(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(budget="200steps", evaluate__points=1)
    run = train(config, tmp_path / "run")
    packed = pack(run.params, run.model.weights, "int8", 32)
    small = replace(run, params=packed)
    score, original = (evaluate_text(each).bits_per_byte for each in (small, run))
    assert original < 3  # it has learned: an untrained one has about 8
    assert score == pytest.approx(original, rel=1e-3)
    # A model of 4 bits is not as good, and decodes what the weights do that it stands for.
    coarse = pack(run.params, run.model.weights, "int4", 32)
    for leaf in (packed, coarse):
        arrays = jax.tree.map(unpacked, leaf, is_leaf=is_packed)
        texts = [
            [
                each.text
                for each in generate(
                    replace(run, params=params), ["the stack", "block"], max_tokens=12, temperature=0.0
                )
            ]
            for params in (leaf, arrays)
        ]
        assert texts[0] == texts[1] and all(texts[0])
