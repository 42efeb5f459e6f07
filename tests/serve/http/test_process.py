"""A real process with a real engine, used by the official `openai` client and by lm-evaluation-harness."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cramjax import cli
from cramjax.evaluation.likelihood import loglikelihoods
from cramjax.formats.tokens import write_tokenizer
from cramjax.language_model import LanguageModel, save_model

openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

KEY = "sesame"
OPTIONS = [
    "--deterministic",
    "--port=0",
    f"--api_key={KEY}",
    "--engine.slots=2",
    "--engine.context=96",
    "--drain_seconds=20",
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def start(model: Path) -> Server:
    command = [sys.executable, "-m", "cramjax.cli", "serve", str(model), *OPTIONS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=ENVIRONMENT)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r" is at (http://\S+)", line):
            return Server(process, found[1])
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def model(spoken: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = replace(spoken, path=path)
    save_model(model, path)
    return model


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Server]:
    served = start(model.path)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.communicate()


def test_the_official_client_is_served(server: Server):
    client = server.client()
    assert [each.id for each in client.models.list()] == ["tiny"]
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the stack", "max_tokens": 24, "seed": 5, "n": 2}
    whole = client.completions.create(**asked, logprobs=2)
    again = client.completions.create(**asked)
    assert [each.text for each in whole.choices] == [each.text for each in again.choices]
    assert whole.choices[0].text != whole.choices[1].text, "each choice has draws of its own"
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [*texts.values()] == [each.text for each in whole.choices]
    assert whole.usage.completion_tokens == sum(len(each.logprobs.tokens) for each in whole.choices)

    says: Any = [{"role": "system", "content": "walk"}, {"role": "user", "content": [{"type": "text", "text": "🙂"}]}]
    said = client.chat.completions.create(model="tiny", messages=says, temperature=0, logprobs=True, top_logprobs=2)
    likeliest = said.choices[0].logprobs.content
    assert all(each.logprob == max(other.logprob for other in each.top_logprobs) for each in likeliest)
    chunks = client.chat.completions.create(
        model="tiny", messages=says, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = [*chunks]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert (
        text == said.choices[0].message.content and pieces[-1].usage.completion_tokens == said.usage.completion_tokens
    )
    schema = {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 1, "maxItems": 3}
    form: Any = {"type": "json_schema", "json_schema": {"name": "votes", "schema": schema, "strict": True}}
    for seed in range(4):
        said = client.chat.completions.create(model="tiny", messages=says, response_format=form, seed=seed)
        votes = json.loads(said.choices[0].message.content)
        assert said.choices[0].finish_reason == "stop" and 0 < len(votes) < 4 and set(votes) <= {"yes", "no"}
    with pytest.raises(openai.BadRequestError, match="temperature must be a number"):
        client.completions.create(**asked, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="gpt-9", prompt="the")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()


def test_log_probabilities_are_those_of_evaluation(server: Server, model: LanguageModel):
    rows = [np.random.default_rng(n).integers(5, 200, 3 + 9 * n).tolist() for n in range(1, 8)]
    found = server.client().completions.create(model="tiny", prompt=rows, max_tokens=1, echo=True, logprobs=1)
    assert [choice.index for choice in found.choices] == list(range(len(rows)))
    sums = [sum(choice.logprobs.token_logprobs[2:-1]) for choice in found.choices]
    expected = loglikelihoods(model, [(row[:2], row[2:]) for row in rows])
    # Sums of up to 64 log-probabilities, along two ways of the same products: in float32, or, on CPUs that have
    # instructions for it, with activations of bfloat16.
    allowed = 2e-3 if model.model.compute_dtype == "float32" else 0.2
    np.testing.assert_allclose(sums, [each.total for each in expected], atol=allowed)


@pytest.mark.filterwarnings("ignore")  # what the harness warns of is not ours
@pytest.mark.parametrize("tokenizer", ["exported", "remote"])
def test_the_harness_gets_the_same_log_likelihoods_over_http_and_from_the_model(
    server: Server, model: LanguageModel, tokenizer: str, tmp_path: Path
):
    """With a tokenizer that puts what stands before a text there; with the server's own, as without it."""
    pytest.importorskip("lm_eval", reason="needs the `eval` extra")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from cramjax.evaluation.harness import CramjaxLM

    options: dict[str, Any] = {"tokenizer_backend": "remote"}
    if tokenizer == "exported":
        pytest.importorskip("transformers", reason="needs the `parity` extra")
        write_tokenizer(tmp_path, model.tokenizer, None, model.context, causal=True)
        options = {"tokenizer": str(tmp_path), "tokenizer_backend": "huggingface", "add_bos_token": True}
    os.environ["OPENAI_API_KEY"] = KEY
    served = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", max_length=96, batch_size=4, auth_token=KEY,
        num_concurrent=2, tokenized_requests=True, **options,
    )  # fmt: skip
    pairs = [("the stack walks", " block by block"), ("every token", " pays"), ("for its own", " place in the budget")]
    pairs += [("", "the stack")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    if tokenizer == "remote":  # this one puts nothing there
        model = replace(model, tokenizer=replace(model.tokenizer, begin_ids=()))
    expected = CramjaxLM(model).loglikelihood(asked)
    found = served.loglikelihood(asked)
    allowed = 1e-3 if model.model.compute_dtype == "float32" else 0.1
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in expected], atol=allowed)
    if model.model.compute_dtype == "float32":
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.filterwarnings("ignore")
def test_the_harness_of_the_command_line_scores_as_evaluate_does(
    server: Server, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`lm_eval run --model local-completions` against `cramjax evaluate`, both as somebody would type them."""
    pytest.importorskip("lm_eval", reason="needs the `eval` or the `parity` extra")
    pytest.importorskip("transformers", reason="needs the `parity` extra")
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", model.tokenizer, None, model.context, causal=True)
    words = ["stack", "walks", "block", "token", "budget", "🙂"]
    rows = [
        {"question": f"the {word} of every {other}", "options": [f"{word}s", other, "its own place"], "gold": n % 3}
        for n, (word, other) in enumerate(itertools.permutations(words, 2))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    theirs = {
        "task": "walks",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    ours = {"choice": {"prompt": "{question}", "choices": "{options}", "gold": "gold"}, "data": str(data)}
    for folder, task in (("theirs", theirs), ("ours", ours)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "walks.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    options = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(tmp_path / "hf"),
        "tokenizer_backend": "huggingface",
        "add_bos_token": True,
        "max_length": 96,
        "num_concurrent": 2,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "walks"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items()), "--batch_size", "4"]
    command += ["--include_path", str(tmp_path / "theirs"), "--log_samples", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OPENAI_API_KEY": KEY}
    done = subprocess.run(command, env=ENVIRONMENT | offline, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").rglob("results_*.json")
    (answers,) = (tmp_path / "out").rglob("samples_walks_*.jsonl")
    samples = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    likelihoods = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]

    asked: list[float] = []

    def recorded(*given: Any) -> Any:
        answers = loglikelihoods(*given)
        asked.extend(answer.total for answer in answers)
        return answers

    monkeypatch.setattr("cramjax.evaluation.scoring.loglikelihoods", recorded)
    scores = tmp_path / "scores.json"
    words = ["evaluate", str(model.path), "--tasks", str(tmp_path / "ours" / "walks.yaml"), "--json", str(scores)]
    assert cli.main(words) == 0
    assert len(asked) == 3 * len(rows) and np.ptp(asked) > 1
    exact = model.model.compute_dtype == "float32"
    np.testing.assert_allclose(likelihoods, asked, atol=1e-3 if exact else 0.1)
    if exact:
        theirs = json.loads(found.read_text(encoding="utf-8"))["results"]["walks"]
        ours = json.loads(scores.read_text(encoding="utf-8"))
        for name in ("acc", "acc_norm"):
            assert theirs[f"{name},none"] == pytest.approx(ours["tasks"]["walks"]["scores"][name]["value"])


def test_no_program_is_compiled_once_it_serves(server: Server):
    request = urllib.request.Request(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    assert re.search(r"^cramjax:compilations_total{.*} 0\.0$", text, re.MULTILINE)
    assert float(re.findall(r"^cramjax:generation_tokens_total{.*} (\S+)$", text, re.MULTILINE)[0]) > 100


def test_sigterm_lets_answers_end_and_takes_no_more(server: Server):
    client = server.client()
    stream = client.completions.create(
        model="tiny", prompt="the", max_tokens=90, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    assert [*stream][-1].choices[0].finish_reason == "length"
    assert server.process.wait(timeout=20) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_port_in_use_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        assert cli.main(["serve", str(tmp_path), f"--port={port}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: cannot listen at 127.0.0.1, port {port}: ") and message.count("\n") == 1
    assert time.monotonic() - began < 20, "before the model is read"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "cramjax serve needs a model"),
        (["m", "--port=a"], "--port must be an integer, got 'a'"),
        (["m", "--port=70000"], "cannot listen at 127.0.0.1, port 70000"),
        (["m", "--queue=-1"], "queue must be at least 0, got -1"),
        (["m", "--engine.slots=0"], "engine.slots must be at least 1, got 0"),
        (["m", "--que=3"], "unknown option --que; did you mean --queue?"),
        (["m", "--api_key= "], "--api_key must not be empty"),
        (["m", "--adapter=x"], "--adapter must be NAME=DIR, got 'x'"),
        (["m", "--adapter", "x=a", "--adapter=x=b"], "--adapter x is given twice"),
        (["m", "--host=nowhere.invalid"], "cannot listen at nowhere.invalid"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
