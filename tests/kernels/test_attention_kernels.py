"""The GPU attention kernels' bookkeeping: which blocks they visit, in what tiles, and what they refuse."""

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import devices
from cramjax.errors import ConfigError
from cramjax.kernels.attention import api, attention
from cramjax.kernels.attention import pallas as kernels
from cramjax.kernels.attention.cudnn import cudnn, cudnn_refusal
from cramjax.kernels.attention.mask import Mask
from cramjax.kernels.attention.reference import reference
from cramjax.kernels.attention.tiles import SHARED_MEMORY, Tile, Tiles, choose_tiles
from cramjax.kernels.choice import choose
from cramjax.planning import GPUS, compile_for, missing
from cramjax.planning.targets import tracing_for

_TARGETS = ("a100-40gb", "rtx-3090", "rtx-4090", "h100")
needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _visits(mask: Mask, length: int, tile: Tile, *, of_keys: bool = False) -> np.ndarray:
    """First block and end of each row of blocks."""
    problem = kernels._Problem(
        length, length, False, mask.causal, mask.window, 1.0, None, Tiles(tile, tile, tile), True
    )
    ids = kernels._documents(mask, (1, length), (1, length))
    x = jnp.zeros((1, length, 1, 16))
    visible = kernels._visible(problem, tile, x, x, *ids)
    return np.asarray(kernels._visits(visible.swapaxes(1, 2) if of_keys else visible))[0]


_DOCUMENTS = jnp.asarray(np.repeat([[7, 2, 5, 3]], 256, axis=1).astype(np.int32))  # in any order


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        (Mask(), 256),
        (Mask(causal=True), 136),
        (Mask(causal=True, window=65), 31),
        (Mask(causal=True, window=64), 31),
        (Mask(causal=True, window=1), 16),
        (Mask(window=65), 46),
        (Mask(query_segment_ids=_DOCUMENTS, kv_segment_ids=_DOCUMENTS), 64),
        (Mask(causal=True, query_segment_ids=_DOCUMENTS, kv_segment_ids=_DOCUMENTS), 40),
        (Mask(kv_mask=jnp.arange(1024)[None] < 100), 32),
        (Mask(kv_mask=jnp.zeros((1, 1024), bool)), 0),
    ],
)
@pytest.mark.parametrize("of_keys", [False, True])
def test_blocks_that_the_mask_empties_are_not_visited(mask: Mask, blocks: int, of_keys: bool) -> None:
    visits = _visits(mask, 1024, Tile(64, 64, 4, 2), of_keys=of_keys)
    assert (visits[:, 1] - visits[:, 0]).sum() == blocks


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_tiles_are_powers_of_two_that_a_tensor_core_takes(head_dim: int, itemsize: int, capability: str) -> None:
    tiles = choose_tiles(head_dim, itemsize, capability)
    for tile in (tiles.forward, tiles.dq, tiles.dkv):
        for block in (tile.block_q, tile.block_k):
            assert block >= 16 and block & (block - 1) == 0


def _operand(head_dim: int, dtype: str, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype)


def _chosen(head_dim: int, mask: Mask) -> str:
    x = jnp.zeros((2, 256, 4, head_dim), jnp.bfloat16)
    return choose("attention", api._ordered(x, x, mask), None, x, x, mask, None).name


@pytest.mark.parametrize("target", [name for name, gpu in GPUS.items() if gpu.has_bfloat16])
def test_on_a_gpu_the_kernels_come_first(target: str) -> None:
    with tracing_for(GPUS[target]):
        assert _chosen(64, Mask(causal=True)) == "pallas"
        assert _chosen(512, Mask(causal=True)) == "xla"
        assert _chosen(64, Mask(query_positions=jnp.zeros((2, 256), jnp.int32))) == "xla"
    assert _chosen(64, Mask(causal=True)) == "xla"


_CPU = devices.Target("cpu", "cpu", None)


@pytest.mark.parametrize(
    ("target", "causal", "length", "head_dim", "first"),
    [
        # A GPT's and an encoder's shapes on a Hopper card.
        ("h100", True, 1024, 64, "cudnn"),
        ("h100", True, 2048, 128, "cudnn"),
        ("h100", True, 128, 64, "cudnn"),
        ("h200", True, 1024, 128, "cudnn"),
        ("h100", False, 128, 64, "pallas"),
        ("h100", False, 511, 64, "pallas"),
        ("h100", False, 512, 64, "cudnn"),
        ("h100", False, 4096, 128, "cudnn"),
        ("h100", True, 1024, 96, "pallas"),
        ("h100", True, 1024, 32, "pallas"),
        ("h100", True, 1024, 256, "pallas"),
        # Others.
        ("a100-40gb", True, 1024, 64, "pallas"),
        ("rtx-4090", True, 1024, 128, "pallas"),
        ("b200", True, 1024, 128, "pallas"),
        (None, True, 1024, 64, "pallas"),
    ],
)
def test_the_order_is_that_of_speed(target: str | None, causal: bool, length: int, head_dim: int, first: str) -> None:
    device = _CPU
    if target is not None:
        gpu = GPUS[target]
        device = devices.Target("gpu", gpu.name, ".".join(map(str, gpu.capability)))
    order = api.preference(device, causal=causal, length=length, head_dim=head_dim)
    assert order[0] == first and order[-2:] == ("xla", "reference")
    assert sorted(order) == sorted(api.implementations())


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [("pallas", "its kernels are for NVIDIA GPUs and this is a cpu"), ("cudnn", "NVIDIA GPUs and this is a cpu")],
)
def test_without_a_gpu_the_kernels_say_so(implementation: str, reason: str) -> None:
    x = jnp.zeros((1, 4, 1, 16))
    with pytest.raises(ConfigError, match=f"{implementation!r} cannot run here: .*{reason}"):
        attention(x, x, x, causal=True, implementation=implementation)


@pytest.mark.parametrize(
    ("head_dim", "implementation", "arguments", "reason"),
    [
        (512, "pallas", {}, "its tiles hold heads of at most 256, not 512"),
        (64, "pallas", {"query_positions": jnp.zeros((2, 256), jnp.int32)}, "it places queries at 0, 1, …"),
        (64, "cudnn", {}, "its plan is made on the GPU itself, and this is compiled ahead of time"),
    ],
)
def test_what_a_gpu_cannot_run_is_an_error_by_name(
    head_dim: int, implementation: str, arguments: dict[str, Any], reason: str
) -> None:
    x = jnp.zeros((2, 256, 4, head_dim), jnp.bfloat16)
    with tracing_for(GPUS["h100"]), pytest.raises(ConfigError, match=f"{implementation!r} cannot run here: {reason}"):
        attention(x, x, x, causal=True, implementation=implementation, **arguments)


_IDS = jnp.zeros((2, 18), jnp.int32)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "keys", "mask", "softcap", "reason"),
    [
        ("8.0", "bfloat16", 64, 18, Mask(causal=True, window=5), None, None),
        ("9.0", "float16", 128, 8, Mask(), None, None),
        ("7.5", "bfloat16", 64, 18, Mask(), None, "compute capability 8.0, and a card has 7.5"),
        (None, "bfloat16", 64, 18, Mask(), None, "compute capability 8.0, and a card has None"),
        ("8.0", "float32", 64, 18, Mask(), None, "bfloat16 and float16, not float32"),
        ("9.0", "bfloat16", 256, 18, Mask(), None, "up to 128, not 256"),
        ("9.0", "bfloat16", 20, 18, Mask(), None, "multiples of 8 up to 128, not 20"),
        ("9.0", "bfloat16", 64, 17, Mask(), None, "even lengths only, not 18 queries and 17 keys"),
        ("9.0", "bfloat16", 64, 18, Mask(), 15.0, "no soft-cap"),
        ("9.0", "bfloat16", 64, 18, Mask(query_segment_ids=_IDS, kv_segment_ids=_IDS), None, "mask of all pairs"),
        ("9.0", "bfloat16", 64, 18, Mask(kv_mask=_IDS == 0), None, "mask of all pairs"),
        ("9.0", "bfloat16", 64, 18, Mask(query_positions=_IDS), None, "cached decoding"),
        ("9.0", "bfloat16", 64, 18, Mask(window=5), None, "looks back only"),
        ("9.0", "bfloat16", 64, 8, Mask(causal=True), None, "as many keys as queries, not 8 for 18"),
        ("9.0", "bfloat16", 64, 0, Mask(), None, r"nothing to compute in shapes \(2, 18, 4, 64\) and \(2, 0, 4, 64\)"),
    ],
)
def test_cudnn_says_what_it_does_not_take(
    capability: str | None,
    dtype: str,
    head_dim: int,
    keys: int,
    mask: Mask,
    softcap: float | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "target", lambda: devices.Target("gpu", "a card", capability))
    q, k = (jnp.zeros((2, length, 4, head_dim), dtype) for length in (18, keys))
    got = cudnn_refusal(q, k, mask, softcap)
    assert got == reason or (got and reason and re.search(reason, got))


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (Mask(), {"mask_type": "NO_MASK", "sliding_window_length": 0}),
        (Mask(causal=True), {"mask_type": "CAUSAL", "sliding_window_length": 0}),
        (Mask(causal=True, window=5), {"mask_type": "CAUSAL", "sliding_window_length": 5}),
    ],
)
def test_cudnn_is_asked_for_what_the_mask_says(
    mask: Mask, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN itself is not here: what it is asked for is.
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return cudnn(q, k, v, mask, scale=0.25, softcap=None).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, 18, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'custom_call @(__cudnn\S+?)\(.*?backend_config = "(.*?)"[,}]', text)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, text in calls:
        asked = json.loads(text.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert asked["fmha_scale"] == 0.25
        assert {key: asked[key] for key in wanted} == wanted


def _value_and_gradients(**arguments: Any) -> Any:
    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, **arguments).astype(jnp.float32).sum()

    return jax.value_and_grad(total, (0, 1, 2))


@needs_compiler
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, "bfloat16"),
        (128, "float32"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [(128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (256, "float32")]
        ),
    ],
)
def test_kernels_compile_within_shared_memory(target: str, head_dim: int, dtype: str) -> None:
    # A kernel that asks for more shared memory than the card has does not compile.
    x = _operand(head_dim, dtype, 1024)
    text = compile_for(target, _value_and_gradients(causal=True), x, x, x).text
    assert all(f"attention_{name}" in text for name in ("forward", "dq", "dkv"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [17, 1000])
def test_kernels_compile_with_every_mask(target: str, head_dim: int, dtype: str, length: int) -> None:
    q, k = (jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype) for heads in (4, 2))
    ids, padding = (jax.ShapeDtypeStruct((2, length), kind) for kind in ("int32", "bool"))

    def every_mask(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, padding: jax.Array) -> Any:
        masks = {"segment_ids": ids, "kv_mask": padding, "window": 100, "softcap": 20.0}
        return _value_and_gradients(causal=False, **masks)(q, k, v)

    assert "attention_dkv" in compile_for(target, every_mask, q, k, k, ids, padding).text


@pytest.mark.parametrize("documents", [False, True])
def test_on_a_mesh_each_device_computes_its_own_sequences(documents: bool) -> None:
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x = jax.random.normal(jax.random.key(0), (8, 40, 2, 16))
    ids = jnp.arange(40)[None] // jnp.arange(7, 15)[:, None] if documents else None

    def gradient(x: jax.Array, ids: jax.Array | None, compute: Any) -> jax.Array:
        mask = Mask(True, None, ids, ids)
        return jax.grad(lambda x: jnp.sum(jnp.sin(compute(x, x, x, mask, scale=0.3, softcap=None))))(x)

    interpreted = functools.partial(kernels.pallas, interpret=True)
    split = jax.device_put((x, ids), jax.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(functools.partial(gradient, compute=interpreted)).lower(*split).compile()
    assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()
    # float32 sums of 40 terms near 1
    np.testing.assert_allclose(compiled(*split), gradient(x, ids, reference), atol=1e-5)


@needs_compiler
def test_memory_grows_with_the_sequence_and_not_with_its_square() -> None:
    def temporaries(length: int) -> int:
        x = _operand(64, "bfloat16", length)
        return compile_for("rtx-4090", _value_and_gradients(causal=True), x, x, x).temporaries

    assert temporaries(16384) < 8.1 * temporaries(2048)
