"""Tasks as they are written, and as they are scored by models whose answers are known in another way."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cramjax.config import TokenizerConfig
from cramjax.data.records import Record
from cramjax.data.tokenizer import Tokenizer, make_tokenizer
from cramjax.errors import ConfigError, DataError, UserError
from cramjax.evaluation import compare_on_tasks, evaluate_tasks, load_task, loglikelihoods, task_names
from cramjax.evaluation.made import agreement
from cramjax.evaluation.results import ScoreDifference
from cramjax.evaluation.scoring import gold_of, normalised
from cramjax.evaluation.task import ChoiceConfig, PairsConfig, Task, TaskConfig
from cramjax.language_model import LanguageModel
from cramjax.serve import generate

from .helpers import MakeModel, WriteTask, write_rows

CHOICE = """
choice:
  prompt: "{question}"
  choices: "{options}"
  gold: gold
"""
QUESTIONS = [
    {"question": f"The {noun} near the kings", "options": ["works", "work", "a dancer", "sleeps"], "gold": place % 4}
    for place, noun in enumerate(["author", "pilot", "child", "woman", "king", "surgeon", "farmer"])
]


def lls(model: LanguageModel, context: str, continuations: list[str]) -> np.ndarray:
    """Of continuations that start with a space, as tokens of the whole."""
    words = model.tokenizer
    before = words.encode(context)
    pairs = [([words.separator_id, *before], words.encode(context + end)[len(before) :]) for end in continuations]
    return np.array([each.total for each in loglikelihoods(model, pairs)])


def test_choices_are_compared_by_sum_by_character_and_by_byte(causal: LanguageModel, write_task: WriteTask):
    rows = [{**row, "options": [*row["options"][:3], "schläft im Fluß"]} for row in QUESTIONS]
    scores = evaluate_tasks(causal, write_task(CHOICE, rows))["task"]
    lengths = [
        ("acc", lambda text: 1),
        ("acc_norm", len),
        ("acc_bytes", lambda text: len(text.encode())),
    ]
    for name, length in lengths:
        right = []
        for row in rows:
            sums = lls(causal, row["question"], [f" {option}" for option in row["options"]])
            right.append(int(np.argmax(sums / [length(option) for option in row["options"]])) == row["gold"])
        assert scores[name].value == np.mean(right), name
    assert scores.items == len(rows) and scores.kind == "choice" and not scores.notes
    low, high = scores["acc"].interval  # pyright: ignore[reportGeneralTypeIssues]
    assert low <= scores["acc"].value <= high


def test_examples_stand_solved_before_a_prompt_and_are_not_scored(causal: LanguageModel, write_task: WriteTask):
    yaml = CHOICE + 'description: "Which?\\n"\nfewshot: {examples: 2, separator: "; "}\n'
    scores = evaluate_tasks(causal, write_task(yaml, QUESTIONS))["task"]
    first, second = QUESTIONS[:2]
    before = f"Which?\n{first['question']} works; {second['question']} work; "
    right = [
        int(np.argmax(lls(causal, before + row["question"], [f" {option}" for option in row["options"]])))
        == row["gold"]
        for row in QUESTIONS[2:]
    ]
    assert scores.items == 5 and scores["acc"].value == np.mean(right)


def test_examples_may_come_from_another_file(causal: LanguageModel, write_task: WriteTask, tmp_path: Path):
    write_task("", QUESTIONS[:2], name="solved")
    together = write_task(CHOICE + "fewshot: {examples: 2}\n", QUESTIONS, name="together")
    apart = write_task(CHOICE + "fewshot: {examples: 2, data: solved.jsonl}\n", QUESTIONS[2:], name="apart")
    scores = evaluate_tasks(causal, [together, apart])
    assert scores["together"].scores == scores["apart"].scores and scores["apart"].items == 5


def test_contexts_that_are_cut_are_counted(causal: LanguageModel, write_task: WriteTask):
    rows = [{**row, "question": row["question"] * (1 + 20 * (place == 3))} for place, row in enumerate(QUESTIONS)]
    scores = evaluate_tasks(causal, write_task(CHOICE, rows))["task"]
    assert scores.notes == ("4 of 28 contexts were cut from the left to fit the model's 64 tokens",)
    assert "warning: task: 4 of 28 contexts were cut" in str(evaluate_tasks(causal, write_task(CHOICE, rows)))


PAIRS = 'pairs: {good: "{good}", bad: "{bad}"}\n'


def test_pairs_of_a_causal_model(causal: LanguageModel):
    scores = evaluate_tasks(causal, "agreement", limit=40)["agreement"]
    rows = list(agreement())[:40]
    right = [np.subtract(*lls(causal, "", [row["good"], row["bad"]])) > 0 for row in rows]
    assert scores.items == 40 and scores["acc"].value == np.mean(right)
    assert 0 < scores["acc"].value < 1


def test_pairs_of_a_masked_model(masked: LanguageModel, write_task: WriteTask):
    from cramjax.evaluation import pseudo_loglikelihoods

    rows = list(agreement())[:12]
    scores = evaluate_tasks(masked, write_task(PAIRS, rows))["task"]
    encode = masked.tokenizer.encode
    sums = pseudo_loglikelihoods(masked, [encode(text) for row in rows for text in (row["good"], row["bad"])])
    right = [sums[2 * place].total > sums[2 * place + 1].total for place in range(12)]
    assert scores["acc"].value == np.mean(right)


PROMPTS = ["The author", "The pilot near", "A", "the kings"]


def test_continuations_are_compared_after_normalisation(causal: LanguageModel, write_task: WriteTask):
    """The answers are what the model writes up to a stop, but for spaces and punctuation; every other one is wrong."""
    written = [each.text for each in generate(causal, PROMPTS, max_tokens=24, temperature=0.0)]
    stops = [written[0][9:11], written[2][12:14]]
    ends = [min((text.find(stop) for stop in stops if stop in text), default=len(text)) for text in written]
    assert ends[0] <= 9 and ends[2] <= 12
    answers = [[f"  {text[:end]} !", "or this"] for text, end in zip(written, ends, strict=True)]
    rows = [
        {"prompt": prompt, "answers": answer if place % 2 == 0 else "wrong"}
        for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    yaml = f"""
generate:
  prompt: "{{prompt}}"
  answer: "{{answers}}"
  stop: {json.dumps(stops)}
  max_tokens: 24
  normalise: [punctuation, spaces]
"""
    assert evaluate_tasks(causal, write_task(yaml, rows))["task"]["exact_match"].value == 0.5


def test_what_counts_is_extracted_of_both_sides(causal: LanguageModel, write_task: WriteTask):
    text = generate(causal, PROMPTS, max_tokens=24, temperature=0.0)[0].text
    rows = [
        {"answer": f"before {text[3:6]} after"},  # of which the same is extracted
        {"answer": text[4]},  # which holds less, and counts whole: its group
        {"answer": "nothing of it"},
        {"answer": "nothing"},
    ]
    yaml = f"""
generate:
  prompt: "{PROMPTS[0]}"
  answer: "{{answer}}"
  stop: []
  max_tokens: 24
  extract: {json.dumps(_literally(text[3]) + "(" + _literally(text[4]) + ")" + _literally(text[5]))}
  normalise: []
"""
    scores = evaluate_tasks(causal, write_task(yaml, rows))["task"]
    assert scores["exact_match"].value == 0.5
    without = yaml.replace('extract: "', 'extract: "#####')
    scores = evaluate_tasks(causal, write_task(without, rows))["task"]
    assert scores["exact_match"].value == 0
    assert scores.notes == ("4 of 4 continuations hold nothing to extract",)


def _literally(text: str) -> str:
    return re.escape(text)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), " The  $1,234.5 an \n owl. "),
        (("strip",), "The  $1,234.5 an \n owl."),
        (("lower", "articles", "spaces"), "$1,234.5 owl."),
        (("punctuation", "spaces"), "The 12345 an owl"),
        (("strip", "numbers"), "The  1234.5 an \n owl"),
    ],
)
def test_steps_of_normalisation(steps: Any, expected: str):
    assert normalised(" The  $1,234.5 an \n owl. ", steps) == expected


def test_texts_are_scored_token_by_token_over_windows(causal: LanguageModel, write_task: WriteTask):
    texts = ["The author laughs. " * 30, "Größe"]
    scores = evaluate_tasks(causal, write_task('text: {text: "{text}"}', [{"text": text} for text in texts]))["task"]
    nats, tokens = 0.0, 0
    for text in texts:
        ids = causal.tokenizer.encode(text)
        row, tokens = [causal.tokenizer.separator_id, *ids], tokens + len(ids)
        for start in range(0, len(ids), 64):
            stop = min(start + 64, len(ids))
            window = row[max(0, stop - 64) : stop + 1]
            count = stop - start
            nats -= loglikelihoods(causal, [(window[:-count], window[-count:])])[0].total
    size = sum(len(text.encode()) for text in texts)
    assert len(causal.tokenizer.encode(texts[0])) > 64
    assert scores["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert scores["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_two_models_on_the_same_items(causal: LanguageModel, model_of: MakeModel, write_task: WriteTask):
    other = model_of(seed=1)
    task = write_task(CHOICE, QUESTIONS)
    found = compare_on_tasks(causal, other, [task, "agreement"], limit=30)
    a, b = evaluate_tasks(causal, [task, "agreement"], limit=30), evaluate_tasks(other, [task, "agreement"], limit=30)
    assert found.a == a and found.b == b
    assert [(each.task, each.name) for each in found.differences] == [
        *(("task", name) for name in ("acc", "acc_norm", "acc_bytes")),
        ("agreement", "acc"),
    ]
    for each in found.differences:
        assert each.difference == pytest.approx(b[each.task][each.name].value - a[each.task][each.name].value)
    same = compare_on_tasks(causal, causal, task).differences[0]
    assert same.interval == (0.0, 0.0) and same.verdict == "not told apart: the interval includes 0"


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "words"),
    [
        ((-0.1, 0.2), True, "not told apart: the interval includes 0"),
        ((0.1, 0.2), True, "B is better: the interval excludes 0"),
        ((-0.2, -0.1), True, "A is better: the interval excludes 0"),
        ((-0.2, -0.1), False, "B is better: the interval excludes 0"),
        (None, True, "one item says nothing of others"),
    ],
)
def test_verdicts(interval: Any, higher_is_better: bool, words: str):
    assert ScoreDifference("t", "s", 0.0, 0.1, 0.1, interval, higher_is_better).verdict == words


def test_perplexities_of_other_tokens_are_not_compared(
    causal: LanguageModel, model_of: MakeModel, write_task: WriteTask
):
    characters = Tokenizer(make_tokenizer(TokenizerConfig(kind="bytes"), []).backend, 256, 257, 256)
    other = replace(model_of(seed=1), tokenizer=characters)
    found = compare_on_tasks(causal, other, write_task('text: {text: "{text}"}', [{"text": "The kings"}] * 3))
    assert [each.name for each in found.differences] == ["bits_per_byte"]


def test_scores_are_plain_values_and_tables(causal: LanguageModel, write_task: WriteTask):
    scores = evaluate_tasks(causal, write_task(CHOICE + "limit: 5\n", QUESTIONS), limit=6)
    plain = json.loads(json.dumps(scores.json()))
    task = plain["tasks"]["task"]
    assert task["items"] == 5 and task["kind"] == "choice"
    assert set(task["scores"]) == {"acc", "acc_norm", "acc_bytes"}
    assert len(task["scores"]["acc"]["interval"]) == 2
    assert task["settings"]["choice.prompt"] == "{question}" and task["settings"]["limit"] == 5
    assert len(task["settings"]["rows_sha256"]) == 64
    lines = str(scores).splitlines()
    assert lines[0].startswith("a-model. Intervals: bootstrap over items, 2,000 resamples, seed 0")
    assert [line.split()[:2] for line in lines if "task" in line] == [["task", "score"], ["task", "acc"]]
    comparison = compare_on_tasks(causal, causal, write_task(CHOICE, QUESTIONS))
    assert json.loads(json.dumps(comparison.json()))["differences"][0]["verdict"].startswith("not told apart")
    assert "not told apart: the interval includes 0" in str(comparison)


def test_another_order_of_rows_is_another_digest(causal: LanguageModel, write_task: WriteTask):
    first = evaluate_tasks(causal, write_task(CHOICE, QUESTIONS), limit=2)["task"].settings["rows_sha256"]
    again = evaluate_tasks(causal, write_task(CHOICE, QUESTIONS[:2]))["task"].settings["rows_sha256"]
    other = evaluate_tasks(causal, write_task(CHOICE, QUESTIONS[1::-1]))["task"].settings["rows_sha256"]
    assert first == again != other


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_is_what_the_template_makes_of_it(causal: LanguageModel, write_task: WriteTask):
    model = replace(causal, chat_template=CHAT)
    yaml = CHOICE + 'chat: true\ndescription: "Be brief."\nfewshot: {examples: 1}\n'
    scores = evaluate_tasks(model, write_task(yaml, QUESTIONS))["task"]
    before = f"<system>Be brief.<user>{QUESTIONS[0]['question']}<assistant>works<user>"
    right = [
        int(np.argmax(lls(model, f"{before}{row['question']}<assistant>", row["options"]))) == row["gold"]
        for row in QUESTIONS[1:]
    ]
    assert scores["acc"].value == np.mean(right)


GOLD = ChoiceConfig(choices=("no", "yes", "2"), gold="g")


@pytest.mark.parametrize(
    ("given", "place"), [("yes", 1), (" no ", 0), (2, 2), (1, 1), ("B", 1), ("1", 1), ("2", 2), (0, 0)]
)
def test_ways_to_say_which_is_right(given: Any, place: int):
    assert gold_of(GOLD, ["no", "yes", "2"], Record({"g": given}, "f, line 1")) == place


@pytest.mark.parametrize(
    ("labels", "given", "place"), [(("false", "true"), True, 1), (("1", "2"), 1, 0), ("{l}", "p", 1)]
)
def test_labels_say_which_is_right(labels: Any, given: Any, place: int):
    config = ChoiceConfig(choices=("no", "yes"), gold="g", labels=labels)
    assert gold_of(config, ["no", "yes"], Record({"g": given, "l": ["q", "p"]}, "f, line 1")) == place


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"gold": 4},
            "line 2: the gold field 'gold' holds 4. It must say one of 4 choices: its text, its place from 0",
        ),
        ({"gold": -1}, "line 2: the gold field 'gold' holds -1"),
        ({"gold": "E"}, "line 2: the gold field 'gold' holds 'E'"),
        ({"gold": True}, "line 2: the gold field 'gold' holds True"),
        ({"gold": None}, "line 2: the gold field 'gold' is empty. A task needs rows with answers."),
        ({"gold": ""}, "line 2: the gold field 'gold' is empty"),
        ({"options": ["one"]}, "line 2: a choice is among two or more, got ['one']"),
        ({"options": ["one", ""]}, "line 2: choice 1 is empty"),
        ({"options": ["one", " x" * 200]}, "of its own after its prompt, and a-model scores 1 to 64"),
        ({"question": None}, "line 2: {question} must be a text or a number, got null"),
    ],
)
def test_rows_that_cannot_be_used(causal: LanguageModel, write_task: WriteTask, row: dict[str, Any], message: str):
    with pytest.raises(DataError) as error:
        evaluate_tasks(causal, write_task(CHOICE, [QUESTIONS[0], {**QUESTIONS[1], **row}]))
    assert message in str(error.value)


def test_rows_without_a_field(causal: LanguageModel, write_task: WriteTask):
    rows = [{key: value for key, value in row.items() if key != "gold"} for row in QUESTIONS]
    with pytest.raises(DataError, match="line 1: there is no field 'gold'. Its fields: question, options."):
        evaluate_tasks(causal, write_task(CHOICE, rows))
    with pytest.raises(DataError, match="line 1: there is no answer in '{a}'"):
        evaluate_tasks(causal, write_task('generate: {answer: "{a}", max_tokens: 4}', [{"a": " "}]))
    with pytest.raises(DataError, match="line 1: the good and the bad text must differ, and be texts; got 'x' and 'x'"):
        evaluate_tasks(causal, write_task(PAIRS, [{"good": "x", "bad": "x"}]))
    with pytest.raises(DataError, match="line 1: there is no text in '{a}'"):
        evaluate_tasks(causal, write_task('text: {text: "{a}"}', [{"a": ""}]))


def test_files_without_rows(causal: LanguageModel, write_task: WriteTask):
    with pytest.raises(DataError, match="task.jsonl has no rows: a task needs one or more"):
        evaluate_tasks(causal, write_task(CHOICE, []))
    with pytest.raises(DataError, match="has no rows after the 7 that are examples"):
        evaluate_tasks(causal, write_task(CHOICE + "fewshot: {examples: 7}\n", QUESTIONS))
    with pytest.raises(DataError, match="has 7 rows, too few for 8 examples"):
        evaluate_tasks(causal, write_task(CHOICE + "fewshot: {examples: 8}\n", QUESTIONS))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("data: x.jsonl\n", "a task has one of choice, pairs, generate and text, got none"),
        (PAIRS + 'text: {text: "{a}"}\n', "got pairs, text: give one"),
        (PAIRS + "chat: true\n", "chat is of choice and generate, and this task is pairs"),
        (PAIRS + "fewshot: {examples: 2}\n", "fewshot is of choice and generate"),
        ("pairs: {good: '{a}'}\n", "pairs.bad must be given"),
        ("choice: {choices: [no, yes], gold: g}\n", "choice.choices"),
        ("choice: {choices: ['a', 'b'], gold: g, promt: x}\n", "did you mean choice.prompt?"),
        ("generate: {answer: '{a}', max_tokens: 0}\n", "generate.max_tokens must be at least 1, got 0"),
        ("generate: {answer: '{a}', normalise: [upper]}\n", "generate.normalise"),
    ],
)
def test_files_that_are_no_tasks(write_task: WriteTask, yaml: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_task(write_task(yaml))
    assert message in str(error.value)


def test_tasks_that_cannot_be_asked(
    causal: LanguageModel, masked: LanguageModel, model_of: MakeModel, write_task: WriteTask
):
    choice = write_task(CHOICE, QUESTIONS, name="choice")
    generating = write_task('generate: {answer: "{a}", max_tokens: 64}', [{"a": "x"}], name="generating")
    text = write_task('text: {text: "{a}"}', [{"a": "x"}], name="text")

    def refused(model: LanguageModel, tasks: Any, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            evaluate_tasks(model, tasks, **options)
        return str(error.value)

    assert "the task choice is choice: a-model is a masked model" in refused(masked, ["agreement", choice])
    assert "the task generating is generate: a-model is a masked model" in refused(masked, generating)
    assert "cramjax evaluate a-model --text FILE" in refused(masked, text)
    assert "is an encoder without a head" in refused(model_of(kind="encoder"), "agreement")
    assert "generate.max_tokens=64, and a-model sees 64 tokens in all" in refused(causal, generating)
    assert "has a prompt, which a masked model takes none of" in refused(
        masked, write_task(PAIRS[:-2] + ', prompt: "x"}', [{"good": "a", "bad": "b"}])
    )
    assert "there is no task 'agrement'; did you mean agreement? Tasks: agreement, arc" in refused(causal, "agrement")
    assert "two tasks are called choice" in refused(causal, [choice, "agreement", choice])
    assert "the task blimp comes without data: give its file, --data blimp=FILE" in refused(causal, "blimp")
    assert "data is given for piqa, which is no task here: blimp" in refused(causal, "blimp", data={"piqa": "x"})
    assert "data is of one task, and there are 2" in refused(causal, ["blimp", "piqa"], data="x.jsonl")
    assert "limit must be 1 or more, got 0" in refused(causal, "agreement", limit=0)
    assert "there are no tasks" in refused(causal, [])
    assert "has no chat template" in refused(causal, write_task(CHOICE + "chat: true\n", QUESTIONS))
    assert "is no regular expression" in refused(
        causal, write_task('generate: {answer: "{a}", max_tokens: 4, extract: "("}', [{"a": "x"}])
    )
    with pytest.raises(DataError, match=r"task.jsonl, line 1: the chat template cannot render it \(no system\)"):
        template = "{{ raise_exception('no system') }}"
        evaluate_tasks(replace(causal, chat_template=template), write_task(CHOICE + "chat: true\n", QUESTIONS))


ARC = {"question": "Which?", "choices": {"text": ["sun", "moon"], "label": ["1", "2"]}, "answerKey": "2"}
SAMPLES: dict[str, dict[str, Any]] = {
    "arc": ARC,
    "openbookqa": {**ARC, "question_stem": "It is the"},
    "piqa": {"goal": "To dry", "sol1": "wait", "sol2": "run", "label": 1},
    "boolq": {"passage": "A king.", "question": "is he", "label": 0},
    "blimp": {"sentence_good": "The kings work.", "sentence_bad": "The kings works."},
    "gsm8k": {"question": "One and one?", "answer": "It is 2.\n#### 2"},
}


@pytest.mark.parametrize("name", task_names())
def test_tasks_that_come_with_cramjax_can_be_scored(name: str, model_of: MakeModel, tmp_path: Path):
    """Each has data of its own, or takes a file of the format that it names."""
    model = model_of(context=320)
    data = write_rows(tmp_path / "rows.jsonl", [SAMPLES[name]] * 6) if name in SAMPLES else None
    scores = evaluate_tasks(model, name, data=data, limit=3)[name]
    assert scores.items in (1, 3) and all(math.isfinite(score.value) for score in scores.scores)
    assert name in SAMPLES or load_task(name).config.data is not None


def test_tasks_in_python(causal: LanguageModel, tmp_path: Path):
    """A task need not be a file; data that is given takes the place of its own."""
    rows = list(agreement())[:5]
    task = Task("mine", TaskConfig(pairs=PairsConfig(good="{good}", bad="{bad}")))
    scores = evaluate_tasks(causal, task, data=write_rows(tmp_path / "rows.jsonl", rows))
    assert scores["mine"].scores == evaluate_tasks(causal, "agreement", limit=5)["agreement"].scores
    with pytest.raises(ConfigError, match="got none: give one"):
        evaluate_tasks(causal, Task("empty", TaskConfig()))
