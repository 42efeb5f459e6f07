"""Steps compiled for eight GPUs that are not there: what each holds falls as their number grows, and what they send."""

import re

import jax
import pytest

from cramjax.config import RunConfig
from cramjax.errors import ConfigError
from cramjax.model import objective_for
from cramjax.parallel import batch_sharding, bytes_per_device, make_mesh, on_mesh, zero_shardings
from cramjax.planning import Compiled, compile_for, compile_step, missing, targets
from cramjax.recipes import load_recipe
from cramjax.training.parts import Vocabulary, build_model, optimizer_for
from cramjax.training.step import initial_state, state_shardings

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _gpt(*changes: str) -> RunConfig:
    return load_recipe("gpt-124m", ["--batch.size=16", "--optim.name=adamw", *changes])


def _held(devices: int) -> dict[str, int]:
    """Bytes of each device at ZeRO-3: of weights and optimizer by the shardings that the step is compiled with; of
    gradients by the compiler, as the outputs of a program that computes nothing else.
    """
    config, sizes = _gpt(f"--train.fsdp={devices}"), Vocabulary(50304, 0, None)
    with targets.tracing_for(targets.gpu_named("h100")):
        mesh = make_mesh(None, devices, targets.devices_of("h100", devices))
        model = build_model(config, sizes)
        optimizer = optimizer_for(config, model)
        objective = objective_for(config.objective, model)
        state = jax.eval_shape(lambda: initial_state(model.init(jax.random.key(0)), optimizer, 0))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(mesh, state, model.weights, 3),
    )
    tokens = jax.ShapeDtypeStruct((16, 1025), "int32", sharding=batch_sharding(mesh))
    gradients = jax.grad(lambda params, tokens: objective(params, tokens, None, 0.5, True).total)
    compiled = compile_for(
        "h100",
        on_mesh(mesh, gradients),
        state.params,
        tokens,
        mesh=mesh,
        out_shardings=zero_shardings(mesh, state.params, model.weights, 3).gradients,
    )
    assert compiled.arguments == pytest.approx(bytes_per_device((state.params, tokens)), rel=1e-3)
    return {
        "weights": bytes_per_device(state.params),
        "gradients": compiled.outputs,
        "optimizer": bytes_per_device(state.optimizer),
    }


@needs_compiler
@pytest.mark.slow
def test_weights_gradients_and_optimizer_fall_with_the_number_of_devices() -> None:
    one = _held(1)
    weights = one["weights"]
    assert one == pytest.approx({"weights": weights, "gradients": weights, "optimizer": 2 * weights}, rel=1e-5)
    for devices in (2, 8):
        held = _held(devices)
        print(devices, {kind: f"{size / 2**20:.1f} MiB" for kind, size in held.items()})
        assert held == pytest.approx({kind: size / devices for kind, size in one.items()}, rel=0.15)
    # And the step holds no more than that as its arguments.
    step = compile_step(_gpt("--train.fsdp=8"), "h100", 8)
    assert step.arguments == pytest.approx(held["weights"] + held["optimizer"], rel=0.01)
    assert step.aliases == pytest.approx(step.arguments, rel=0.01)


def _collectives(compiled: Compiled, kind: str) -> list[str]:
    """Lines of a program in which devices exchange something."""
    return [line for line in compiled.text.splitlines() if re.search(rf" {kind}(-start)?\(", line)]


def _arrays(compiled: Compiled) -> set[str]:
    return set(re.findall(r"\b[a-z]+\d+\[[\d,]+\]", compiled.text))


@needs_compiler
@pytest.mark.slow
def test_one_layer_is_gathered_at_a_time_and_gradients_are_scattered() -> None:
    compiled = compile_step(_gpt("--train.fsdp=8"), "h100", 8)
    found = re.findall(r"([a-z]+\d+)\[([\d,]+)\]", " ".join(_collectives(compiled, "all-gather")))
    # Either way round: jax 0.10.2 gathers matrices transposed, 0.12 as they are.
    gathered = {(kind, frozenset(map(int, shape.split(",")))) for kind, shape in found}
    # The matrices of one block, in bfloat16; the embedding, for the lookup and for the decoder. No activations: eight
    # devices' tokens are 16 × 1024.
    block = {("bf16", 2304, 768), ("bf16", 768, 768), ("bf16", 3072, 768)}
    whole = block | {("f32", 50304, 768), ("bf16", 50304, 768)}
    shared = {(kind, frozenset((long // 8, short))) for kind, long, short in whole}
    complete = {(kind, frozenset((long, short))) for kind, long, short in whole}
    assert complete <= gathered <= complete | shared
    assert len(_collectives(compiled, "reduce-scatter")) >= 2
    # Only sums of scalars are reduced whole; of all layers there are shares alone.
    assert all("f32[3]" in line or "f32[]" in line or "f32[2]" in line for line in _collectives(compiled, "all-reduce"))
    assert not {"f32[12,768,2304]", "f32[12,768,768]", "f32[12,768,3072]", "f32[12,3072,768]"} & _arrays(compiled)
    assert "f32[12,96,768]" in _arrays(compiled)
    assert all(f"attention_{name}" in compiled.text for name in ("forward", "dq", "dkv"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_parameters_are_gathered_after_the_update(zero: int) -> None:
    """On a card that JAX knows by another's name, and on both axes of a mesh."""
    compiled = compile_step(_gpt("--train.fsdp=4", f"--train.zero={zero}"), "rtx-3090", 8)
    gathered = " ".join(_collectives(compiled, "all-gather"))
    assert all(shape in gathered for shape in ("f32[12,768,2304]", "f32[12,3072,768]", "f32[50304,768]"))
    weights = 4 * 123_532_032
    assert compiled.arguments == pytest.approx(weights + 2 * weights / 4, rel=0.01)


def test_devices_that_cannot_be_divided_so_are_an_error() -> None:
    if missing() is not None:
        pytest.skip(str(missing()))
    sizes = "batch.size", "batch.microbatch", "evaluate.batch"
    with pytest.raises(ConfigError, match="fsdp must divide the 8 devices"):
        compile_step(_gpt("--train.fsdp=3", *(f"--{key}=48" for key in sizes)), "h100", 8)
