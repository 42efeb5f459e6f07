"""Estimated bytes of a step: against the arrays of the state, against the compilers, and how they must grow."""

from dataclasses import replace
from typing import Any, get_args

import jax
import pytest

from cramjax.config import Optimizer, RunConfig
from cramjax.gpus import GPUS, Gpu
from cramjax.model import train_flops_per_token
from cramjax.planning import KINDS, compile_here, compile_step, estimate_memory, missing
from cramjax.planning.plan import under
from cramjax.planning.steps import vocabulary_of
from cramjax.recipes import load_recipe
from cramjax.training.parts import build_model, optimizer_for
from cramjax.training.step import initial_state

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _estimate(config: RunConfig, gpu: Gpu | None = GPUS["rtx-4090"], dtype: str = "bfloat16") -> Any:
    return estimate_memory(config, vocab_size=vocabulary_of(config).vocab_size, compute_dtype=dtype, gpu=gpu)


@pytest.mark.parametrize("name", get_args(Optimizer))
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_optimizer_are_the_bytes_of_the_state(name: str, tied: bool) -> None:
    options = [f"--optim.name={name}", f"--model.tied={tied}", "--optim.head_lr=null", "--batch.microbatch=null"]
    if name in ("lomo", "adalomo"):
        options += ["--train.param_dtype=bfloat16"]
    config = load_recipe("gpt-124m", options)
    model = build_model(config, vocabulary_of(config))

    def create() -> Any:
        return initial_state(model.init(jax.random.key(0)), optimizer_for(config, model), 0)

    state = jax.eval_shape(create)
    memory = _estimate(config).by_kind

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    # Counters and random keys are not counted, nor, of factored moments, the norms'.
    assert memory["weights"] == size(state.params)
    assert memory["optimizer"] == pytest.approx(size(state.optimizer), rel=0.02, abs=1 << 20)


def test_activations_grow_with_the_microbatch_and_states_do_not() -> None:
    small, large = (_estimate(load_recipe("gpt-124m", [f"--batch.microbatch={n}"])).by_kind for n in (4, 16))
    # The stream's gradient is among them, or not yet: a 200th.
    assert large["activations"] == pytest.approx(4 * small["activations"], rel=0.005)
    assert all(small[kind] == large[kind] for kind in ("weights", "optimizer"))
    assert set(small) == set(KINDS)


def test_policies_that_recompute_more_keep_less() -> None:
    config = load_recipe("gpt-124m")
    kept = [_estimate(under(config, p)).by_kind["activations"] for p in ("none", "selective", "full", "offload")]
    assert kept == sorted(kept, reverse=True)
    # Of full recomputation, the stream of each layer is left, in two bytes a number, and its gradient.
    assert kept[2] == (12 + 1) * 16 * 1024 * 768 * 2


def test_host_bytes_are_those_that_left_the_device() -> None:
    config = load_recipe("gpt-124m", ["--optim.name=adamw"])
    assert _estimate(config).host_bytes == 0
    offloaded = _estimate(under(config, "full+offload_optimizer"))
    parameters = _estimate(config).by_kind["weights"] // 4
    # float32 weights and two moments; a gradient as the device writes it, as it has arrived, the next one; their sum.
    assert offloaded.host_bytes == pytest.approx(parameters * (12 + 2 + 2 + 2 + 4), rel=1e-6)
    assert offloaded.by_kind["optimizer"] == 0 and offloaded.by_kind["weights"] == 2 * parameters


def test_the_host_holds_what_all_devices_send() -> None:
    config = load_recipe("gpt-124m", ["--optim.name=adamw", "--batch.microbatch=16", "--evaluate.batch=16"])
    for policy, kind in (("full+offload_optimizer", "optimizer"), ("offload", "activations")):
        one = under(config, policy)
        data, fsdp = (replace(one, train=replace(one.train, zero=3, **{n: 4})) for n in ("data_parallel", "fsdp"))
        hosts = [_estimate(c).host_by_kind[kind] for c in (one, data, fsdp)]
        # Along `data` every device has a copy of the state; activations are of one batch, whoever holds its sequences.
        assert hosts == [hosts[0], (4 if kind == "optimizer" else 1) * hosts[0], hosts[0]]


@pytest.mark.parametrize(("zero", "shared"), [(1, "optimizer"), (2, "gradients"), (3, "weights")])
def test_each_stage_of_zero_shares_one_more_state(zero: int, shared: str) -> None:
    config = load_recipe("gpt-1.3b", ["--batch.microbatch=8", "--evaluate.batch=8", f"--train.zero={zero}"])
    one, eight = config, replace(config, train=replace(config.train, fsdp=8, data_parallel=1))
    before, after = _estimate(one).by_kind, _estimate(eight).by_kind
    order = ("optimizer", "gradients", "weights")
    for kind in order:
        share = after[kind] / before[kind]
        if order.index(kind) <= order.index(shared):
            # The gradient of the head is whole on each device until it is summed.
            assert share < (0.25 if kind == "gradients" else 0.126)
        elif kind == "weights":
            assert share == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--train.remat=full"], ["--train.compute_dtype=float32"], ["--train.layer_loop=scan"]],
    ids=["none", "full", "float32", "scan"],
)
def test_estimates_are_within_a_tenth_of_the_cpus_own_program(options: list[str]) -> None:
    config = load_recipe("gpt-mini", ["--train.compute_dtype=bfloat16", "--train.data_parallel=1", *options])
    exact = compile_here(config)
    dtype = config.train.compute_dtype
    assert _estimate(config, None, dtype).device_bytes == pytest.approx(exact.device_bytes, rel=0.1)
    if options and options[0] in ("--train.remat=full", "--train.layer_loop=scan"):
        return  # its layers are a loop, of which the compiler counts the body once
    # The compiler counts the model's FLOPs, and beside them the optimizer and what is no product.
    tokens = config.batch.size * config.data.sequence_length
    flops = tokens * train_flops_per_token(
        config.model, config.tokenizer.vocab_size, config.data.sequence_length, causal=True
    )
    assert exact.flops is not None and 1 < exact.flops / flops < 1.8


_CASES = [
    ("crammed-bert", "none", "rtx-2080-ti", 96, 8160),
    ("crammed-bert", "selective", "h100", 512, 8192),
    ("gpt-124m", "full", "rtx-4090", 16, 512),
    ("gpt-124m", "offload", "a6000", 16, 512),
    ("gpt-1.3b", "full+offload_optimizer", "rtx-4090", 8, 256),
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("model", "policy", "card", "microbatch", "size"), _CASES)
def test_estimates_are_within_a_tenth_of_the_compilers_bytes(
    model: str, policy: str, card: str, microbatch: int, size: int
) -> None:
    config = under(load_recipe(model, ["--optim.name=adamw"]), policy)
    config = replace(config, batch=replace(config.batch, microbatch=microbatch, size=size))
    compiled, estimate = compile_step(config, card), _estimate(config, GPUS[card])
    print(f"{estimate.device_bytes / 2**30:.2f} / {compiled.device_bytes / 2**30:.2f} GiB")
    assert estimate.device_bytes == pytest.approx(compiled.device_bytes, rel=0.1)
    assert estimate.host_bytes == pytest.approx(compiled.host, rel=0.02)
