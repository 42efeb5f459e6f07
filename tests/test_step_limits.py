"""The bytes of programs that a compiler has made: against arithmetic, and of recipes against their limits."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cramjax.gpus import GPUS
from cramjax.planning import compile_for, missing
from cramjax.planning.work import StepWork
from cramjax.recipes import load_recipe

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@needs_compiler
@pytest.mark.slow
def test_bytes_of_compiled_programs(scripts) -> None:
    """What the compiler prints today, against arithmetic on what each function must read and write."""

    def count(function, *arguments, donate=()):
        text = compile_for("h100", function, *arguments, donate=donate).text
        return [kernel for kernel in scripts[0].traffic(text).kernels if kernel.bytes > 1000]

    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((4096,), jnp.int32)
    one, layer = 4096 * 1024 * 2, 1024 * 1024 * 2

    (kernel,) = count(lambda x: jax.nn.relu(x) ** 2, x)
    assert (kernel.read, kernel.written) == (one, one)

    def walk(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    kernels = count(walk, x, w)
    products = [kernel for kernel in kernels if kernel.kind == "products"]
    assert sum(kernel.times for kernel in products) == 8
    # Where the product slices its layer out of the stack, it reads a number of four bytes to know which.
    assert sum(kernel.bytes for kernel in products) - 8 * (2 * one + layer) in (0, 8 * 4)
    tanh = [kernel for kernel in kernels if kernel.only == "takes a tanh of"]
    assert sum(kernel.bytes for kernel in tanh) == 8 * 2 * one

    def update(w, x, i):
        return jax.lax.dynamic_update_index_in_dim(w, x[:1024] * 2, i, 0)

    index = jax.ShapeDtypeStruct((), jnp.int32)
    (kernel,) = count(update, w, x, index, donate=(0,))
    assert (kernel.read, kernel.written) == (layer + 4, layer)

    (kernel,) = count(lambda w, i: w.reshape(-1, 1024)[i % 8192] * 3, w, rows)
    assert (kernel.read, kernel.written, kernel.kind) == (one + 4096 * 4, one, "scatter and gather")


@needs_compiler
@pytest.mark.slow
def test_the_script_reports_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = [
        "gpt-124m",
        "--device=a100-80gb",
        "--model.layers=2",
        "--optim.name=adamw",
        "--batch.size=16",
        "--json",
        str(path),
    ]
    result = subprocess.run(
        [sys.executable, "step_bytes.py", *words], cwd=_BENCHMARKS, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    step = report["steps"]["gpt-124m"]
    assert report["device"] == "a100-80gb" and step["gigabytes"] == pytest.approx(sum(step["kinds"].values()))
    assert not step["endless"] and step["runs"]["attention"] > 0
    # AdamW reads a float32 weight, its gradient and two moments, and writes three.
    weights = 50304 * 768 + 2 * 768 * (2304 + 768 + 3072 + 3072)
    assert step["kinds"]["optimizer"] > 7 * 4 * weights / 1e9 * 0.99
    assert f"{step['gigabytes']:.2f}" in result.stdout and "Broken rules" in result.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-124m", "crammed-bert"])
def test_a_step_moves_no_more_than_its_limit(scripts, name: str) -> None:
    step_bytes = scripts[1]
    result = step_bytes.measure(name, step_bytes.CASES[name], "h100")
    print(f"{name}: {result.gigabytes:.1f} GB outside products and attention")
    assert step_bytes.LIMITS == {"gpt-124m": 24e9, "crammed-bert": 75e9}
    assert result.gigabytes <= step_bytes.LIMITS[name] / 1e9
    assert result.breaches == () and result.float32_logits == () and result.endless == ()
    # What the planner takes the same step to move, from its configuration alone.
    config = load_recipe(name, step_bytes.CASES[name])
    step = StepWork(config, config.tokenizer.vocab_size, "bfloat16", GPUS["h100"], 1)
    work = step.microbatch
    assert (work.passes + step.update_passes) / 1e9 == pytest.approx(result.gigabytes, rel=0.1)
    assert work.product_bytes / 1e9 == pytest.approx(result.product_gigabytes, rel=0.1)


@needs_compiler
def test_a_mistake_is_one_message() -> None:
    words = [sys.executable, "step_bytes.py", "gpt-124m", "--device=h1000"]
    result = subprocess.run(words, cwd=_BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "no device 'h1000'" in result.stderr.splitlines()[-1]
