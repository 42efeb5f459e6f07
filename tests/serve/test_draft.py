"""A draft model's guesses: what is answered with them is what is answered without, and whose guesses are refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cramjax.config import TokenizerConfig
from cramjax.data.tokenizer import train_tokenizer
from cramjax.errors import ConfigError
from cramjax.language_model import LanguageModel
from cramjax.serve import generate
from cramjax.serve.engine import Engine
from cramjax.serve.request import Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training import Run

from .test_engine import GREEDY, finish, log_probabilities, prompts, tokens

MakeRun = Callable[..., Run]

DRAFTED = EngineConfig(slots=3, page=64, draft="a-draft", draft_tokens=3, cache_tokens=192, prefix_cache=False)


@pytest.fixture(scope="module")
def model(run_of: MakeRun) -> LanguageModel:
    return run_of(sequence_length=64, qk_norm=True, kv_heads=1).language_model


@pytest.fixture(scope="module")
def near(model: LanguageModel) -> LanguageModel:
    """A draft that thinks much like the model: its weights, with some noise."""
    draw = np.random.default_rng(0)
    head = np.asarray(model.params["embed"]["token"]["table"])
    table = head + 0.02 * draw.normal(size=head.shape).astype(head.dtype)
    return replace(model, params={**model.params, "embed": {**model.params["embed"], "token": {"table": table}}})


@pytest.fixture(scope="module")
def engines(model: LanguageModel, near: LanguageModel) -> tuple[Engine, Engine]:
    """Without a draft, and with one."""
    plain = Engine(model, replace(DRAFTED, draft=None))
    return plain, Engine(model, DRAFTED, draft=near).prepare()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParameters(temperature=0.9, seed=3),
        SamplingParameters(temperature=1.0, top_k=9, top_p=0.9, seed=2**40),
        SamplingParameters(temperature=0.0, repetition_penalty=1.3),  # which is guessed for in no way
    ],
    ids=["greedy", "sampled", "narrowed", "penalised"],
)
def test_the_answer_is_the_same(engines: tuple[Engine, Engine], sampling: SamplingParameters) -> None:
    """More than have slots, of unequal lengths, long and short: the same tokens, and some guesses are right."""
    plain, drafted = engines
    own = [Request(prompt, 20 + number, sampling) for number, prompt in enumerate(prompts(5, 40, seed=4))]
    before = drafted.load()
    got = finish(drafted, own)
    after = drafted.load()
    assert [tokens(each) for each in got] == [tokens(each) for each in finish(plain, own)]
    guessed, right = (getattr(after, n) - getattr(before, n) for n in ("guessed_tokens", "right_guesses"))
    assert sum(p.guessed for each in got for p in each) == guessed
    assert sum(p.right for each in got for p in each) == right
    assert guessed == 0 if sampling.repetition_penalty != 1 else 0.3 * guessed < right < guessed
    assert after.compilations == before.compilations and plain.load().guessed_tokens == 0


@pytest.mark.slow
def test_a_draft_has_read_what_is_found(model: LanguageModel) -> None:
    """A text that begins like one that nobody guessed for, then like one that somebody did. The draft is the model
    itself, which is wrong about nothing that it has read, but for ties.
    """
    prompt = tuple(range(20, 44))
    asked = [Request(prompt, 1, GREEDY), *(Request((*prompt, 7), 24, GREEDY) for _ in range(2))]
    shares, cached, texts = [], [], []
    for keeps in (False, True):
        engine = Engine(model, replace(DRAFTED, page=4, prefix_cache=keeps), draft=model)
        for request in asked:
            before = engine.load()
            (got,) = finish(engine, [request])
            after = engine.load()
            shares.append((after.guessed_tokens - before.guessed_tokens, after.right_guesses - before.right_guesses))
            cached.append(got[-1].cached)
            texts.append(tokens(got))
    assert [guessed > 9 for guessed, _ in shares] == [False, True, True] * 2 and texts[:3] == texts[3:]
    assert all(right >= 0.9 * guessed for guessed, right in shares)
    assert cached[:3] == [0] * 3 and cached[5] == len(prompt)


@pytest.mark.slow
def test_draws_with_a_draft_are_as_frequent_as_they_are_probable(engines: tuple[Engine, Engine]) -> None:
    """Pearson's chi-square of the third token, which guesses decide, over many seeds; beside tokens too rare to count,
    all together.
    """
    _, drafted = engines
    prompt, way, many = (9, 10, 11), SamplingParameters(temperature=1.0, top_k=3), 400
    model = drafted._language_model
    drawn = finish(drafted, [Request(prompt, 3, replace(way, seed=seed)) for seed in range(many)])
    thirds = [tuple(tokens(each))[1:] for each in drawn]
    first = {tokens(each)[0] for each in drawn}

    def shares(text: tuple[int, ...]) -> dict[int, float]:
        row = log_probabilities(model, text)[-1].astype(np.float64)
        best = np.argsort(-row)[:3]
        return dict(zip(best.tolist(), (np.exp(row[best]) / np.exp(row[best]).sum()).tolist(), strict=True))

    right: dict[tuple[int, ...], float] = {}
    for a, p in shares(prompt).items():
        assert a in first
        for b, q in shares((*prompt, a)).items():
            for c, r in shares((*prompt, a, b)).items():
                right[b, c] = right.get((b, c), 0.0) + p * q * r
    counted = {pair: share for pair, share in right.items() if share * many >= 5}
    assert set(thirds) <= set(right) and len(counted) > 5
    seen = {pair: thirds.count(pair) for pair in counted}
    rest = many - sum(seen.values()), many * (1 - sum(counted.values()))
    value = sum((seen[pair] - many * share) ** 2 / (many * share) for pair, share in counted.items())
    value += (rest[0] - rest[1]) ** 2 / max(rest[1], 1e-9) if rest[1] > 1 else 0.0
    free = len(counted)
    assert value < free + 4 * np.sqrt(2 * free)  # four standard deviations: one in ten thousand


@pytest.mark.slow
def test_generate_says_how_many_guesses_were_right(model: LanguageModel, near: LanguageModel) -> None:
    """Past the context too. A draft that is the model itself is right, but for ties."""
    options = {"max_tokens": 80, "temperature": 0.8, "seed": 5}
    plain = generate(model, ["the stack", "budget"], **options)
    for draft in (near, model):
        drafted = generate(model, ["the stack", "budget"], draft=draft, **options)
        assert [each.text for each in drafted] == [each.text for each in plain]
        guessed, right = (sum(getattr(each, name) for each in drafted) for name in ("guessed", "right"))
        assert guessed > 20 and (right > 0.9 * guessed if draft is model else right < guessed)


def test_a_draft_that_cannot_guess_is_refused(model: LanguageModel, run_of: MakeRun) -> None:
    words = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=290), ["another text " * 50])
    other = replace(model, tokenizer=words)
    with pytest.raises(ConfigError, match="must have the tokenizer of some-run, and [0-9]+ words"):
        Engine(model, DRAFTED, draft=other)
    with pytest.raises(ConfigError, match="sees 16 tokens, and requests have up to 64: give engine.context=16"):
        Engine(model, DRAFTED, draft=run_of().language_model)
    with pytest.raises(ConfigError, match="from lookup or from draft: give one of them, got lookup=2 too"):
        Engine(model, replace(DRAFTED, lookup=2), draft=model)
    with pytest.raises(ConfigError, match="draft must be null with deterministic=true"):
        Engine(model, EngineConfig(draft="x", deterministic=True), draft=model)
