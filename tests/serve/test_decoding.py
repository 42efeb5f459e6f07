"""Weights as they are held for decoding, against the model as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import LayerConfig
from cramjax.errors import ConfigError
from cramjax.kernels.dense.few_rows import refusal
from cramjax.kernels.packed import Packed, Streamed, is_packed, unpacked
from cramjax.language_model import LanguageModel
from cramjax.model import in_one_call as in_one_call_module
from cramjax.serve import decoding, generate
from cramjax.serve.decoding import choose, for_decoding
from cramjax.training import Run

MakeRun = Callable[..., Run]

needs_kernel = pytest.mark.skipif(refusal() is not None, reason=f"the kernel cannot run here: {refusal()}")


def use_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the kernel is the faster in everything."""
    seconds = {f"{form} kernel": 1.0 for form in ("float32", "bfloat16", "int8", "int4")} | {"float32 xla": 2.0}
    monkeypatch.setattr(decoding, "speeds", lambda: seconds)


def exact(run: Run) -> LanguageModel:
    """The model of a run, computed in float32 on CPUs that would take bfloat16 as well."""
    given = run.language_model
    return replace(given, model=replace(given.model, compute_dtype="float32"))


def logits(given, tokens: jax.Array) -> np.ndarray:
    """Of each token, decoded one by one."""
    model, cache, out = given.model, given.model.init_cache(len(tokens), tokens.shape[1]), []
    step = jax.jit(model.decode)
    for column in tokens.T:
        hidden, cache = step(given.params, cache, column[:, None])
        out.append(model.logits(given.params, hidden[:, 0]))
    return np.asarray(jnp.stack(out, 1))


@needs_kernel
@pytest.mark.parametrize(
    ("weights", "model"),
    [
        ("float32", {"activation": "swiglu"}),
        ("bfloat16", {"tied": False, "pattern": (LayerConfig(window=4), LayerConfig())}),
        ("int8", {}),
        ("int4", {"tied": False}),
    ],
)
def test_decoding_is_that_of_the_weights_as_held(
    run_of: MakeRun, monkeypatch: pytest.MonkeyPatch, weights: str, model: dict
):
    """The same logits as by XLA from the same weights, unpacked to float32."""
    use_kernel(monkeypatch)
    run = exact(run_of(**model))
    held = for_decoding(run, weights)
    leaves = jax.tree.leaves(held.params, is_leaf=is_packed)
    assert sum(isinstance(leaf, Streamed) for leaf in leaves) >= 5
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(3, 300, (8, 6))
    )  # as many as attention by the kernel begins at
    plain = {path: unpacked(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(held.params, is_leaf=is_packed)}

    def as_array(path, leaf):
        own = plain[path].astype(jnp.float32)
        return own if own.shape == leaf.shape else own.T  # the tied table, which is read as the head

    reference = replace(run, params=jax.tree_util.tree_map_with_path(as_array, run.params))
    np.testing.assert_allclose(logits(held, tokens), logits(reference, tokens), rtol=2e-4, atol=2e-4)
    assert for_decoding(held, weights) is held


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["w8a8", "w4a8"])
def test_activations_of_8_bits_are_near_those_of_float32(
    run_of: MakeRun, monkeypatch: pytest.MonkeyPatch, weights: str
):
    """Of the same codes: logits that differ, by a few percent of their spread."""
    use_kernel(monkeypatch)
    run = exact(run_of(activation="swiglu"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 6)))
    held = for_decoding(run, weights)
    streamed = [leaf for leaf in jax.tree.leaves(held.params, is_leaf=is_packed) if isinstance(leaf, Streamed)]
    assert len(streamed) >= 5 and all(leaf.rounds for leaf in streamed)
    rounded = logits(held, tokens)
    exactly = logits(for_decoding(run, {"w8a8": "int8", "w4a8": "int4"}[weights]), tokens)
    error = np.sqrt(np.mean((rounded - exactly) ** 2)) / exactly.std()
    assert 1e-4 < error < 0.03


@needs_kernel
def test_greedy_text_is_that_of_float32(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch):
    use_kernel(monkeypatch)
    run = exact(run_of())
    plain = generate(run, ["the stack", "budget"], max_tokens=12, temperature=0)
    by_kernel = generate(run, ["the stack", "budget"], max_tokens=12, temperature=0, weights="float32")
    assert [made.text for made in by_kernel] == [made.text for made in plain]


@needs_kernel
@pytest.mark.parametrize("in_one_call", [True, False])
def test_the_cache_stays_in_place(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch, in_one_call: bool):
    """A loop over tokens holds no second cache, whether they go through the stack in one call or block by block."""
    use_kernel(monkeypatch)
    calls = []

    def refusal() -> str | None:
        calls.append(None)
        return None if in_one_call else "it is not to"

    monkeypatch.setattr(in_one_call_module, "refusal", refusal)
    held = for_decoding(exact(run_of()), "int8")
    model, cache = held.model, held.model.init_cache(4, 128)

    def three(params, cache, token):
        def turn(_, carry):
            hidden, cache = model.decode(params, carry[1], carry[0])
            return jnp.argmax(model.logits(params, hidden), axis=-1), cache

        return jax.lax.fori_loop(0, 3, turn, (token, cache))

    tokens = jnp.full((4, 1), 5)
    analysis = jax.jit(three, donate_argnums=1).lower(held.params, cache, tokens).compile().memory_analysis()
    assert calls and analysis is not None
    assert analysis.temp_size_in_bytes < sum(part.nbytes for part in jax.tree.leaves(cache.blocks)) / 2


@needs_kernel
def test_in_one_call_as_block_by_block(run_of: MakeRun, monkeypatch: pytest.MonkeyPatch):
    """Several new tokens of a row at once, with padding behind them, and caches that go on from there."""
    use_kernel(monkeypatch)
    held = for_decoding(exact(run_of(activation="swiglu", norm="rmsnorm", bias=True)), "float32")
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 4)))

    def answers() -> list[np.ndarray]:
        model, out = held.model, []
        cache = model.init_cache(2, 16)
        for counts in ([4, 2], [1, 3], [2, 0]):
            hidden, cache = jax.jit(model.decode)(held.params, cache, tokens, jnp.asarray(counts))
            out += [np.asarray(hidden[row, :count]) for row, count in enumerate(counts)]
        return out

    together = answers()
    monkeypatch.setattr(in_one_call_module, "refusal", lambda: "it is not to")
    for one, other in zip(together, answers(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_fastest_reader_is_chosen():
    probe = {"float32 kernel": 3.0, "bfloat16 kernel": 1.0, "int8 kernel": 9.0, "float32 xla": 2.0}
    assert choose(probe, "float32") == "xla"
    assert choose(probe, "bfloat16") == "kernel"
    assert choose(probe, "int8") == "kernel"
    assert {choose({}, precision) for precision in ("float32", "bfloat16", "int8", "int4")} == {"xla"}


def test_small_models_and_other_words(run_of: MakeRun):
    given = exact(run_of())
    assert for_decoding(given) is given
    with pytest.raises(ConfigError, match="one of auto, float32, bfloat16, int8, int4, w8a8, w4a8, got 'half'"):
        for_decoding(given, "half")


def test_without_the_kernel(
    run_of: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """bfloat16 is rounded to and held as float32; codes are those of XLA; why is said once."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    decoding._say_slow.cache_clear()
    given = exact(run_of())
    assert for_decoding(given, "float32") is given
    rounded = for_decoding(given, "bfloat16")
    leaves = jax.tree.leaves(rounded.params, is_leaf=is_packed)
    assert not any(isinstance(leaf, Packed) for leaf in leaves)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    table = rounded.params["embed"]["token"]["table"]
    np.testing.assert_array_equal(table, given.params["embed"]["token"]["table"].astype(jnp.bfloat16))
    coded = for_decoding(given, "int8")
    assert not any(isinstance(leaf, Streamed) for leaf in jax.tree.leaves(coded.params, is_leaf=is_packed))
    assert caplog.text.count("there is no C++ compiler") == 1


@needs_kernel
def test_the_probe_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(decoding, "_SHAPE", (1, 64, 64))
    decoding._speeds.cache_clear()
    first = decoding.speeds()
    assert set(first) == {f"{p} kernel" for p in ("float32", "bfloat16", "int8", "int4")} | {"float32 xla"}
    decoding._speeds.cache_clear()
    monkeypatch.setattr(decoding, "_probed", lambda: pytest.fail("measured again"))
    assert decoding.speeds() == first
    decoding._speeds.cache_clear()
