"""ZeRO-Offload compiled for GPUs that are not there: what stays on the device, and what goes to the host, and when."""

import re

import jax
import jax.numpy as jnp
import pytest

from cramjax.model.counts import count_parameters
from cramjax.planning import compile_for, compile_step, missing
from cramjax.recipes import load_recipe
from cramjax.training.offload import write_block

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")

_LLAMA_13B = load_recipe("llama-13b", ["--batch.size=1"])
_PARAMETERS = count_parameters(_LLAMA_13B.model, vocab_size=32000, sequence_length=1024).total


@pytest.mark.slow
def test_a_13b_shape_fits_a_v100_of_32_gb() -> None:
    step = compile_step(_LLAMA_13B, "v100-32gb")
    print(f"{step.device_bytes / 2**30:.2f} GiB of device memory, {step.host / 2**30:.1f} GiB of host memory")
    assert _PARAMETERS == pytest.approx(13.0e9, rel=0.002)
    weights = 2 * _PARAMETERS
    # Tokens and a key beside weights that are rounded to 2 bytes; nothing on the device is as large as all gradients.
    assert weights <= step.arguments <= weights + 2**20
    assert step.outputs <= 2**10 and step.temporaries < weights / 8
    assert step.device_bytes < 32 * 2**30
    # 12 for float32 weights and moments, 2 for gradients as they arrive and 2 where they were copied to.
    assert step.host == pytest.approx(16 * _PARAMETERS, rel=1e-3)


@pytest.mark.slow
def test_gradients_leave_in_the_loop_and_only_once() -> None:
    config = load_recipe("llama-13b", ["--batch.size=1", "--model.layers=4"])
    step = compile_step(config, "v100-32gb")
    parameters = count_parameters(config.model, vocab_size=32000, sequence_length=1024).total
    shape = re.compile(r"bf16\[([\d,]+)\]\{[\d,]+:S\(5\)\}")

    def size(text: str) -> int:
        return 2 * jnp.asarray(list(map(int, text.split(",")))).prod().item()

    sent = 0
    for line in step.text.splitlines():
        if "dynamic-update-slice-start" in line and " fusion-start(" in line:  # in the loop, once for each layer
            buffer, update = re.findall(r"bf16\[([\d,]+)\]", line)[:2]
            assert buffer.split(",")[0] == "4" and buffer.split(",")[1:] == update.split(",")[1:]
            sent += size(buffer)
        elif " copy-start(" in line and (found := shape.search(line)):
            sent += size(found[1])
    assert sent == 2 * parameters
    assert not re.search(r"S\(5\)\}[^=]*= [^=]*fusion\(", step.text)  # nothing computes in host memory


def test_new_weights_take_the_place_of_the_old() -> None:
    blocks = {"kernel": jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16)}
    one = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
    written = compile_for("v100-32gb", write_block, blocks, one, jax.ShapeDtypeStruct((), jnp.int32), donate=(0,))
    assert written.aliases == 8 << 20
    assert written.temporaries < 1 << 20
