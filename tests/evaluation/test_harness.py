"""Our scores against `transformers`' own, and against lm-evaluation-harness on its `hf` model, by both routes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cramjax
from cramjax.errors import RunError
from cramjax.evaluation import evaluate_tasks, loglikelihoods
from cramjax.evaluation.encoding import encode_pair
from cramjax.evaluation.made import agreement, reference, summaries, sums
from cramjax.language_model import LanguageModel

from .conftest import CHAT_TEMPLATE
from .helpers import MakeModel, harness_answers, local_task, run_harness, write_rows

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
lm_eval = pytest.importorskip("lm_eval", reason="needs the `eval` extra")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from cramjax.evaluation.harness import CramjaxLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what the harness and its parts warn of is not ours

ITEMS = 200
NAT = 1e-3
"""Between sums of log-probabilities in float32 by two libraries, of texts of up to 100 tokens."""

# The harness's form of our tasks of the same names.
TASKS = {
    "summaries": {
        "output_type": "multiple_choice",
        "doc_to_text": '{{function}}\n    """',
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "agreement": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{a}} + {{b}} =",
        "doc_to_target": "{{sum}}",
        "fewshot_config": {"sampler": "first_n", "samples": [{"a": 1, "b": 2, "sum": 3}, {"a": 20, "b": 5, "sum": 25}]},
        "num_fewshot": 2,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "reference": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}
ROWS = {"summaries": summaries, "agreement": agreement, "sums": sums, "reference": reference}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of each task as the files that both read."""
    folder = tmp_path_factory.mktemp("rows")
    for name, make in ROWS.items():
        write_rows(folder / f"{name}.jsonl", list(make())[: 8 if name == "reference" else ITEMS])
    return folder


@pytest.fixture(scope="session")
def theirs(llama: Path) -> Any:
    """The Llama by the harness's own adapter for `transformers`."""
    return HFLM(pretrained=str(llama), device="cpu", batch_size=64, max_length=256, dtype="float32")


def harness(model: Any, rows: Path, *names: str, **options: Any) -> dict[str, Any]:
    """What the harness's evaluation gives."""
    tasks = [local_task(name, rows / f"{name}.jsonl", TASKS[name]) for name in names]
    return run_harness(model, tasks, **options)


@pytest.mark.slow
def test_the_harness_gives_what_it_gives_of_transformers(theirs: Any, imported: Path, rows: Path):
    expected = harness(theirs, rows, "summaries", "agreement")
    found = harness(CramjaxLM(imported), rows, "summaries", "agreement")
    for name, count in (("summaries", 4 * ITEMS), ("agreement", 2 * ITEMS)):
        ours, own = harness_answers(found, name), harness_answers(expected, name)
        assert len(ours) == count and np.ptp(own) > 10
        np.testing.assert_allclose(ours, own, atol=NAT, rtol=0)
        metrics = {key: value for key, value in expected["results"][name].items() if key.startswith("acc")}
        assert metrics == {key: found["results"][name][key] for key in metrics}
    # Our own tasks give the same accuracies of the same rows.
    scores = evaluate_tasks(imported, ["summaries", "agreement"], limit=ITEMS)
    for name, each in (
        ("summaries", "acc"),
        ("summaries", "acc_norm"),
        ("summaries", "acc_bytes"),
        ("agreement", "acc"),
    ):
        assert scores[name][each].value == pytest.approx(expected["results"][name][f"{each},none"]), (name, each)


@pytest.mark.slow
def test_our_own_route_gives_what_transformers_computes(llama: Path, imported: Path):
    """Without the harness: texts of one length through the model, unpadded, softmax in float64."""
    compare_with_transformers(
        cramjax.load(imported),
        transformers.AutoModelForCausalLM.from_pretrained(llama).eval(),
        transformers.AutoTokenizer.from_pretrained(llama),
        ITEMS,
    )


def compare_with_transformers(ours: Any, model: Any, tokenizer: Any, items: int) -> None:
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    texts: list[tuple[str, str]] = []
    for row in list(summaries())[:items]:
        texts += [(f'{row["function"]}\n    """', choice) for choice in row["choices"]]
    for row in list(agreement())[:items]:
        texts += [("The teacher said:", f" {row[side]}") for side in ("good", "bad")]
    alike: dict[int, list[tuple[int, list[int], int]]] = {}  # by length: place, ids, tokens of the continuation
    for place, (context, continuation) in enumerate(texts):
        ids = [*begin, *tokenizer(context + continuation, add_special_tokens=False)["input_ids"]]
        before = [*begin, *tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]]
        alike.setdefault(len(ids), []).append((place, ids, len(ids) - len(before)))
    expected = np.zeros(len(texts))
    for group in alike.values():
        for start in range(0, len(group), 16):
            part = group[start : start + 16]
            tokens = torch.tensor([ids for _, ids, _ in part])
            with torch.no_grad():
                logs = torch.log_softmax(model(tokens).logits.double(), -1)
            for (place, _, count), own, row in zip(part, logs, tokens, strict=True):
                expected[place] = float(own[-count - 1 : -1].gather(1, row[-count:, None]).sum())
    pairs = [encode_pair(ours.tokenizer, *text) for text in texts]
    found = [each.total for each in loglikelihoods(ours, pairs)]
    assert len(found) == 6 * items and np.ptp(expected) > 10
    np.testing.assert_allclose(found, expected, atol=NAT, rtol=0)


@pytest.mark.slow
def test_continuations_and_rolling_texts_are_those_of_transformers(theirs: Any, imported: Path, rows: Path):
    """Texts longer than the context, so that windows roll; and continuations, token by token."""
    expected = harness(theirs, rows, "reference", "sums", limit=8)
    found = harness(CramjaxLM(imported), rows, "reference", "sums", limit=8)
    for name in ("bits_per_byte,none", "byte_perplexity,none"):
        own = expected["results"]["reference"][name]
        assert found["results"]["reference"][name] == pytest.approx(own, rel=1e-5)
    texts = [
        [sample["resps"][0][0] for sample in sorted(each["samples"]["sums"], key=lambda sample: sample["doc_id"])]
        for each in (found, expected)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 2
    scores = evaluate_tasks(imported, "reference", limit=8)["reference"]
    # The harness also asks for `<s>` after `<s>`, as its `hf` model has it; we ask for the text.
    assert scores["bits_per_byte"].value == pytest.approx(
        expected["results"]["reference"]["bits_per_byte,none"], rel=0.02
    )


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]  # pyright: ignore


def test_requests_one_by_one_are_those_of_transformers(theirs: Any, imported: Path):
    """Contexts that are empty, end in spaces, name special tokens or do not fit; stops; options of continuations."""
    ours = CramjaxLM(imported)
    texts = [
        # Not the next text: of one text split in two places, the harness's cache reads the wrong logits (0.4.13).
        ("", "A pilot sleeps."),
        ("The author ", "laughs."),
        ("<s>The author", " laughs."),
        ("<|im_start|>user\nWho?<|im_end|>\n", "The king"),
        ("The kings work. " * 60, "The kings"),
    ]
    asked = requests("loglikelihood", texts)
    for own, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(other[0], abs=NAT) and own[1] == other[1]
    prompts = ["The author", "A king", "<|im_start|>user\n"]
    whole = theirs.generate_until(requests("generate_until", [(text, {"max_gen_toks": 12}) for text in prompts]))
    options = [
        {"max_gen_toks": 12},
        {"until": [whole[1][2:4]], "max_gen_toks": 12},
        {"until": "x", "max_new_tokens": 3},
    ]
    asked = requests("generate_until", list(zip(prompts, options, strict=True)))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king"}]
    for messages, reply in ((chat[:1], True), (chat, False)):
        assert ours.apply_chat_template(messages, reply) == theirs.apply_chat_template(messages, reply)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHAT_TEMPLATE
    assert ours.chat_template(False) is None


def test_a_chat_is_asked_as_the_harness_asks_it(imported: Path, theirs: Any, rows: Path):
    options: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Choose.", "limit": 8}
    found, expected = (harness(model, rows, "summaries", **options) for model in (CramjaxLM(imported), theirs))
    np.testing.assert_allclose(
        harness_answers(found, "summaries"), harness_answers(expected, "summaries"), atol=NAT, rtol=0
    )
    task = rows / "chat.yaml"
    yaml = {"choice": {"prompt": '{function}\n    """', "choices": "{choices}", "gold": "gold"}}
    task.write_text(
        json.dumps({**yaml, "data": "made:summaries", "chat": True, "description": "Choose."}), encoding="utf-8"
    )
    scores = evaluate_tasks(imported, task, limit=8)["chat"]
    assert scores["acc"].value == pytest.approx(expected["results"]["summaries"]["acc,none"])


def test_the_harness_knows_us_by_name(causal: LanguageModel, masked: LanguageModel, imported: Path):
    assert get_model("cramjax") is CramjaxLM
    model = CramjaxLM.create_from_arg_obj({"pretrained": str(imported)}, {"batch_size": 8, "device": "cpu"})
    assert model.max_length == 256 and model.prefix_token_id == 0 and model.eot_token_id == 1
    assert CramjaxLM(imported, prefix_token_id=7).prefix_token_id == 7
    assert CramjaxLM(causal).prefix_token_id == causal.tokenizer.separator_id
    with pytest.raises(RunError, match="is a masked model"):
        CramjaxLM(masked)
    with pytest.raises(RunError, match="is not a run directory"):
        CramjaxLM("no-such-run")


def test_what_the_harness_asks_and_we_do_not_know_is_refused(model_of: MakeModel):
    ours = CramjaxLM(model_of())
    with pytest.raises(cramjax.errors.ConfigError, match="asks for num_beams in its generation_kwargs"):  # type: ignore
        ours.generate_until(requests("generate_until", [("a", {"num_beams": 4, "max_gen_toks": 4})]))
    drawn = [("The author", {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 20})] * 2
    texts = ours.generate_until(requests("generate_until", drawn))
    assert texts[0] != texts[1]  # each request has draws of its own
    assert texts == ours.generate_until(requests("generate_until", drawn))
    assert texts != CramjaxLM(model_of(), seed=1).generate_until(requests("generate_until", drawn))
