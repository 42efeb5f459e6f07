"""The engine with keys and values in few bits: what a text gets does not depend on how it was computed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax import loading
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.model import cache as cache_module
from cramjax.model import in_one_call, layers
from cramjax.model.decode import TextCache
from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.engine.programs import default_tokens, make_pool
from cramjax.serve.request import Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training import Run

from ..model.test_coded_pages import SIZE, attended, seen_by
from .test_decoding import exact, needs_kernel, use_kernel
from .test_engine import GREEDY, finish, prompts, tokens

MakeRun = Callable[..., Run]

CODED = EngineConfig(slots=3, page=SIZE, cache_tokens=256, cache_bits=2)


@pytest.fixture(scope="module")
def model(run_of: MakeRun) -> LanguageModel:
    """In float32: bfloat16 would round what one call and another sum in other orders to numbers apart, and those to
    other codes, of which one more or less may change a token.
    """
    return exact(run_of(sequence_length=64, qk_norm=True, kv_heads=1))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Of unequal lengths, two with one beginning of two pages, one that repeats itself."""
    own = prompts(3, 40, seed=4)
    beginning = tuple(range(30, 48))
    drawn = SamplingParameters(temperature=0.8, seed=7)
    texts = [*own, (*beginning, 7, 8, 9), (*beginning, 9), (20, 21, 22, 23) * 6]
    return [Request(text, 16, way) for text, way in zip(texts, [GREEDY, drawn] * 3, strict=True)]


@pytest.fixture(scope="module")
def alone(model: LanguageModel, requests: list[Request]) -> list[list[int]]:
    """What each gets with nothing beside it, and nothing known."""
    engine = Engine(model, replace(CODED, prefix_cache=False)).prepare()
    return [tokens(finish(engine, [request])[0]) for request in requests]


@pytest.mark.slow
def test_texts_that_share_pages_get_what_each_gets_alone(
    model: LanguageModel, requests: list[Request], alone: list[list[int]]
) -> None:
    """Two rounds, of which the second finds its beginnings in codes."""
    engine = Engine(model, CODED).prepare()
    for _ in range(2):
        got = finish(engine, requests)
        assert [tokens(each) for each in got] == alone
    assert max(each[-1].cached for each in got) >= 16


@pytest.mark.slow
def test_texts_that_gave_their_pages_up_go_on_as_before(
    model: LanguageModel, requests: list[Request], alone: list[list[int]]
) -> None:
    engine = Engine(model, replace(CODED, cache_tokens=72, prefix_cache=False))
    assert [tokens(each) for each in finish(engine, requests)] == alone
    assert engine.load().preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lookup": 5}, {"draft": "itself", "draft_tokens": 3}], ids=str)
def test_guesses_that_are_taken_back_change_nothing(
    model: LanguageModel, requests: list[Request], alone: list[list[int]], options: dict[str, Any]
) -> None:
    """The draft is the model, with noise: some of its guesses are right, and some fill a page and are wrong."""
    table = np.asarray(model.params["embed"]["token"]["table"])
    noise = np.random.default_rng(0).normal(size=table.shape).astype(table.dtype)
    near = {**model.params, "embed": {**model.params["embed"], "token": {"table": table + 0.02 * noise}}}
    draft = replace(model, params=near) if "draft" in options else None
    engine = Engine(model, replace(CODED, **options), draft=draft)
    assert [tokens(each) for each in finish(engine, requests)] == alone
    load = engine.load()
    assert 0 < load.right_guesses <= load.guessed_tokens
    assert load.right_guesses < load.guessed_tokens or draft is None  # a text that repeats itself is guessed rightly


def scored(model: LanguageModel, bits: Any) -> tuple[list[int], np.ndarray]:
    """A text of five pages and what is drawn after it, and the log-probabilities of its tokens from the second on."""
    prompt = tuple(np.random.default_rng(6).integers(5, 250, 5 * SIZE).tolist())
    engine = Engine(model, replace(CODED, cache_bits=bits))
    (got,) = finish(engine, [Request(prompt, 4, GREEDY, top_logprobs=0, prompt_logprobs=True)])
    given = [each.logprob for progress in got for each in (*progress.prompt_logprobs, *progress.logprobs)]
    return [*prompt, *tokens(got)], np.array(given[1:], float)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_log_probabilities_are_the_nearer_to_those_in_full_the_more_bits_there_are(
    model: LanguageModel, dtype: str, rounding: float
) -> None:
    """The first page's are those in full, but for another order of sums, which bfloat16 may round to its neighbours.
    Sixteen times fewer steps are about sixteen times the error, and every two bits more a quarter of it.
    """
    model = replace(model, model=replace(model.model, compute_dtype=dtype))
    _, in_full = scored(model, None)
    off = {}
    for bits in (8, 4, 2) if dtype == "float32" else (8, 2):
        difference = (scored(model, bits)[1] - in_full)[: 5 * SIZE - 1]  # what is drawn may differ
        np.testing.assert_allclose(difference[:SIZE], 0.0, atol=rounding)
        off[bits] = np.sqrt(np.mean(difference[SIZE:] ** 2))
    assert 8 * off[8] < off[2]
    if dtype == "float32":
        assert off[8] < 0.02 and 4 * off[8] < off[4] and 2 * off[4] < off[2]


@pytest.mark.slow
def test_log_probabilities_are_those_of_a_forward_pass_whose_attention_is_the_definition(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NumPy, a query at a time. Of 2 bits, whose few steps leave the fewest numbers near the middle of one."""

    def by_definition(*parts: Any) -> np.ndarray:
        out = np.empty(parts[0].shape, np.float32)
        for row, (q, k, v) in enumerate(zip(*map(np.asarray, parts), strict=True)):
            for place in range(len(q)):
                keys, values = seen_by(k, place, 2, 1), seen_by(v, place, 2, -1)
                out[row, place] = attended(q[place], keys, values, None, None)
        return out

    def attention(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return jax.pure_callback(by_definition, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v)

    text, given = scored(model, 2)
    monkeypatch.setattr(layers, "attention", attention)
    stack = model.model

    @jax.jit
    def forward(tokens: Any) -> Any:
        return jax.nn.log_softmax(stack.logits(model.params, stack.hidden(model.params, tokens)), axis=-1)

    right = np.asarray(forward(jnp.asarray([text])))[0, np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(given, right, atol=1e-4)  # float32, another order of sums


def test_the_memory_of_a_full_pool_holds_more_pages_of_few_bits(model: LanguageModel) -> None:
    """By the bytes of what is made: no more than in full, and less than a page of each block away from it."""
    stack = model.model
    sizes = {"context": 1024, "slots": 4, "size": 64}

    def held(bits: int | None) -> tuple[int, int]:
        count = default_tokens(stack, bits=bits, guesses=4 if bits else 0, **sizes)
        made = make_pool(stack, count // 64, 64, 4, bits=bits, guesses=4 if bits else 0)
        return count, sum(x.nbytes for x in jax.tree.leaves(made.pages))

    (tokens_in_full, memory), coded = held(None), {bits: held(bits) for bits in (8, 4, 2)}
    assert tokens_in_full == 4096
    assert all(0.95 * memory < own <= memory for _, own in coded.values())
    # Steps are 16 bits twice: of a key's channel for 64 tokens, of a value's token for a head of 16 channels.
    for bits, (count, _) in coded.items():
        assert count == pytest.approx((4096 - 4 * 68) * 32 / (bits + (0.5 + 2) / 2), rel=0.01)


def test_heads_whose_codes_fill_no_bytes_are_refused(run_of: MakeRun) -> None:
    with pytest.raises(ConfigError, match="cache_bits=2 needs heads whose channels fill whole bytes"):
        Engine(run_of(head_dim=6).language_model, CODED)
    with pytest.raises(ConfigError, match="cache_bits"):
        loading.from_mapping(EngineConfig, {"cache_bits": 3})


@needs_kernel
def test_the_kernels_for_cpus_are_not_asked_for_codes(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the walk of all blocks nor attention in pages, both of which write keys and values; in full each is."""
    use_kernel(monkeypatch)
    held, asked = for_decoding(model, "float32"), list[str]()

    def note(module: Any, name: str) -> None:
        own = getattr(module, name)

        def noted(*args: Any, **options: Any) -> Any:
            asked.append(name)
            return own(*args, **options)

        monkeypatch.setattr(module, name, noted)

    note(in_one_call, "walk")
    note(cache_module, "attend_pages")

    def kernels_of(bits: int | None) -> set[str]:
        pages = make_pool(held.model, 5, SIZE, 2, bits=bits).pages
        rows = {"table": jnp.ones((2, 2), jnp.int32)} | ({} if bits is None else {"slots": jnp.arange(2)})
        row = jnp.zeros(2, jnp.int32)
        cache = TextCache(tuple(replace(own, **rows) for own in pages), jnp.zeros((2, 16), jnp.int32), row, row, row)
        asked.clear()
        jax.eval_shape(lambda tokens: held.model.decode(held.params, cache, tokens), row[:, None])
        return set(asked)

    assert kernels_of(None) == {"walk"}
    in_one_call._say_slow.cache_clear()
    with caplog.at_level("INFO"):
        assert kernels_of(8) == set()
    assert "because keys and values are in codes" in caplog.text
    monkeypatch.setattr(in_one_call, "refusal", lambda: "it is not to")
    assert kernels_of(None) == {"attend_pages"}
    assert kernels_of(8) == set()


@pytest.mark.slow
@needs_kernel
def test_weights_for_the_kernel_change_no_codes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the kernel, attention of XLA: another order of sums, which may change one of 255 steps."""
    use_kernel(monkeypatch)
    (text, given), (right_text, right) = scored(for_decoding(model, "float32"), 8), scored(model, 8)
    assert text == right_text
    np.testing.assert_allclose(given, right, atol=5e-3)
