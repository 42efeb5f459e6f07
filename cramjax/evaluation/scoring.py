"""The kinds of tasks: each makes requests of rows, refusing what cannot be asked, and later measures of the answers."""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cramjax.data.examples import ChatTemplate
from cramjax.data.examples.pieces import Piece
from cramjax.data.records import Record
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.evaluation.bootstrap import Measure, share
from cramjax.evaluation.continuation import continuations, cut
from cramjax.evaluation.encoding import encode_answer, encode_pair, is_cut, opened, windows
from cramjax.evaluation.likelihood import Pair, Progress, Tokens, loglikelihoods, pseudo_loglikelihoods, require_causal
from cramjax.evaluation.rows import fill, fill_list, lookup
from cramjax.evaluation.task import ChoiceConfig, GenerateConfig, Step, Task
from cramjax.language_model import LanguageModel, template_of


@dataclass(frozen=True)
class Measured:
    """What a task came to."""

    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()
    """What a reader should know of it, such as contexts that were cut."""


Work = Callable[[Progress | None], Measured]
"""A task whose requests are made: what is left is to ask the model."""


def prepare(model: LanguageModel, task: Task, rows: Sequence[Record], examples: Sequence[Record]) -> Work:
    """Make the requests of a task.

    Args:
        model: that will be asked.
        task: of any kind.
        rows: that are scored.
        examples: that stand solved before each prompt.

    Raises:
        RunError: the model cannot do such a task.
        DataError: a row cannot be used.
        ConfigError: the task asks for what the model has no room for.
    """
    make = {"choice": _choice, "pairs": _pairs, "generate": _generate, "text": _text}[task.kind]
    model.require_tokens()
    if model.kind != "masked" or task.kind != "pairs":
        try:
            require_causal(model)
        except RunError as error:
            other = f" Score its texts with `cramjax evaluate {model.path} --text FILE`." if task.kind == "text" else ""
            raise RunError(f"the task {task.name} is {task.kind}: {error}{other}") from None
    return make(model, task, rows, examples)


def _choice(model: LanguageModel, task: Task, rows: Sequence[Record], examples: Sequence[Record]) -> Work:
    config = task.config.choice
    assert config is not None
    prompts = _prompts(model, task, [_solved_choice(config, row) for row in examples], config.delimiter)
    pairs: list[Pair] = []
    answers: list[tuple[list[str], int]] = []
    for row in rows:
        choices = _choices_of(config, row)
        answers.append((choices, gold_of(config, choices, row)))
        pairs += [prompts.pair(fill(config.prompt, row), choice, row) for choice in choices]

    def work(progress: Progress | None) -> Measured:
        totals = iter(loglikelihoods(model, pairs, progress))
        right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
        for choices, gold in answers:
            found = np.array([next(totals).total for _ in choices])
            lengths = {"acc": [1] * len(choices), "acc_norm": [len(choice) for choice in choices]}
            lengths["acc_bytes"] = [len(choice.encode()) for choice in choices]
            for name, own in lengths.items():
                right[name].append(int(np.argmax(found / np.array(own))) == gold)
        return Measured(tuple(share(name, own) for name, own in right.items()), _cut_note(model, pairs))

    return work


def gold_of(config: ChoiceConfig, choices: Sequence[str], row: Record) -> int:
    """The place of the right choice.

    Raises:
        DataError: the row does not say, or says what is no choice.
    """
    given = lookup(config.gold, row)
    if given is None or given == "":
        raise DataError(f"{row.where}: the gold field {config.gold!r} is empty. A task needs rows with answers.")
    text = fill(f"{{{config.gold}}}", row).strip()
    if config.labels is not None:
        labels = fill_list(config.labels, row)
        if len(labels) != len(choices):
            raise DataError(f"{row.where}: {len(labels)} labels for {len(choices)} choices: give one for each.")
        if labels.count(text) == 1:
            return labels.index(text)
        raise DataError(f"{row.where}: the gold field {config.gold!r} holds {text!r}, not one of {', '.join(labels)}.")
    texts = [choice.strip() for choice in choices]
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number and texts.count(text) == 1:
        return texts.index(text)
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    if text in letters:
        return letters.index(text)
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    raise DataError(
        f"{row.where}: the gold field {config.gold!r} holds {given!r}. It must say one of {len(choices)} choices: its "
        f"text, its place from 0 to {len(choices) - 1}, or its letter from A to {letters[-1]}. For other words set "
        "choice.labels."
    )


def _choices_of(config: ChoiceConfig, row: Record) -> list[str]:
    choices = fill_list(config.choices, row)
    if len(choices) < 2:
        raise DataError(f"{row.where}: a choice is among two or more, got {choices}.")
    if "" in choices:
        raise DataError(f"{row.where}: choice {choices.index('')} is empty.")
    return choices


def _solved_choice(config: ChoiceConfig, row: Record) -> tuple[str, str]:
    choices = _choices_of(config, row)
    return fill(config.prompt, row), choices[gold_of(config, choices, row)]


def _pairs(model: LanguageModel, task: Task, rows: Sequence[Record], examples: Sequence[Record]) -> Work:
    del examples
    config = task.config.pairs
    assert config is not None
    filled = [(fill(config.good, row), fill(config.bad, row), row) for row in rows]
    for good, bad, row in filled:
        if good == bad or not good or not bad:
            raise DataError(
                f"{row.where}: the good and the bad text must differ, and be texts; got {good!r} and {bad!r}."
            )
    if model.kind == "masked":
        if config.prompt:
            raise ConfigError(
                f"the task {task.name} has a prompt, which a masked model takes none of: use a causal one."
            )
        texts = [_masked_text(model, text, row) for good, bad, row in filled for text in (good, bad)]
        ask, notes = partial(pseudo_loglikelihoods, model, texts), ()
    else:
        pairs = [
            _fitting(model, encode_pair(model.tokenizer, fill(config.prompt, row), config.delimiter + text), text, row)
            for good, bad, row in filled
            for text in (good, bad)
        ]
        ask, notes = partial(loglikelihoods, model, pairs), _cut_note(model, pairs)

    def work(progress: Progress | None) -> Measured:
        found = ask(progress)
        right = [good.total > bad.total for good, bad in zip(found[::2], found[1::2], strict=True)]
        return Measured((share("acc", right),), notes)

    return work


def _masked_text(model: LanguageModel, text: str, row: Record) -> Tokens:
    ids, room = model.tokenizer.encode(text), model.context - len(model.tokenizer.opening()) - 1
    if not 0 < len(ids) <= room:
        raise DataError(f"{row.where}: a text has {len(ids)} tokens, and {model.path} sees 1 to {room}: shorten it.")
    return ids


def _generate(model: LanguageModel, task: Task, rows: Sequence[Record], examples: Sequence[Record]) -> Work:
    config = task.config.generate
    assert config is not None
    pattern = _pattern(config, task)
    if config.max_tokens >= model.context:
        raise ConfigError(
            f"the task {task.name} has generate.max_tokens={config.max_tokens}, and {model.path} sees {model.context} "
            "tokens in all: set fewer."
        )
    solved = [(fill(config.prompt, row), _answers_of(config, row)[0]) for row in examples]
    put = _prompts(model, task, solved, config.delimiter)
    prompts: list[Tokens] = []
    answers: list[list[str]] = []
    for row in rows:
        answers.append(_answers_of(config, row))
        prompts.append(put.ids(fill(config.prompt, row), row))
    lost = sum(cut(model, prompt, config.max_tokens) is not prompt for prompt in prompts)

    def work(progress: Progress | None) -> Measured:
        texts = continuations(model, prompts, max_tokens=config.max_tokens, stop=config.stop, progress=progress)
        found = [_extracted(pattern, text) for text in texts]
        right = [
            got is not None and normalised(got, config.normalise) in {_gold(config, pattern, text) for text in own}
            for got, own in zip(found, answers, strict=True)
        ]
        without = found.count(None)
        notes = [f"{lost:,} of {len(rows):,} prompts were cut from the left to fit the model's context"] if lost else []
        notes += [f"{without:,} of {len(rows):,} continuations hold nothing to extract"] if without else []
        return Measured((share("exact_match", right),), tuple(notes))

    return work


def normalised(text: str, steps: Sequence[Step]) -> str:
    """A text after steps of normalisation, as `GenerateConfig.normalise` says."""
    for step in steps:
        match step:
            case "strip":
                text = text.strip()
            case "lower":
                text = text.lower()
            case "punctuation":
                text = text.translate(str.maketrans("", "", string.punctuation))
            case "articles":
                text = re.sub(r"\b(a|an|the)\b", "", text, flags=re.IGNORECASE)
            case "spaces":
                text = " ".join(text.split())
            case "numbers":
                text = text.replace(",", "").replace("$", "").removesuffix(".")
    return text


def _answers_of(config: GenerateConfig, row: Record) -> list[str]:
    answers = fill_list(config.answer, row)
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError(f"{row.where}: there is no answer in {config.answer!r}. A task needs rows with answers.")
    return answers


def _pattern(config: GenerateConfig, task: Task) -> re.Pattern[str] | None:
    try:
        return None if config.extract is None else re.compile(config.extract)
    except re.error as error:
        raise ConfigError(
            f"the task {task.name} has generate.extract={config.extract!r}, which is no regular expression: {error}."
        ) from None


def _extracted(pattern: re.Pattern[str] | None, text: str) -> str | None:
    if pattern is None:
        return text
    match = pattern.search(text)
    return None if match is None else match[1 if pattern.groups else 0] or ""


def _gold(config: GenerateConfig, pattern: re.Pattern[str] | None, answer: str) -> str:
    found = _extracted(pattern, answer)
    return normalised(answer if found is None else found, config.normalise)


def _text(model: LanguageModel, task: Task, rows: Sequence[Record], examples: Sequence[Record]) -> Work:
    del examples
    config = task.config.text
    assert config is not None
    begin = model.tokenizer.opening()[-1]
    pairs: list[Pair] = []
    counts, tokens, sizes = [], [], []
    for row in rows:
        text = fill(config.text, row)
        ids = model.tokenizer.encode(text)
        if not ids:
            raise DataError(f"{row.where}: there is no text in {config.text!r}: give rows with at least one character.")
        own = list(windows(ids, begin, model.context))
        pairs += own
        counts.append(len(own))
        tokens.append(len(ids))
        sizes.append(len(text.encode()))

    def work(progress: Progress | None) -> Measured:
        each = iter(loglikelihoods(model, pairs, progress))
        nats = np.array([-sum(next(each).total for _ in range(count)) for count in counts])
        in_bytes = Measure("bits_per_byte", nats / math.log(2), np.array(sizes, np.float64), higher_is_better=False)
        in_tokens = Measure("perplexity", nats, np.array(tokens, np.float64), exponential=True, higher_is_better=False)
        return Measured((in_bytes, in_tokens))

    return work


@dataclass(frozen=True)
class _Prompts:
    """How a task puts a prompt: with description and examples before it, as one text or as a conversation."""

    model: LanguageModel
    before: str
    """What stands before each prompt, of a text."""
    turns: list[dict[str, str]]
    """The same, of a conversation."""
    delimiter: str
    template: ChatTemplate | None
    """Of a conversation."""

    def ids(self, prompt: str, row: Record) -> Tokens:
        """Ids of what is to be continued."""
        tokenizer = self.model.tokenizer
        if self.template is None:
            ids = tokenizer.encode(self.before + prompt)
            return [*tokenizer.opening(ids), *ids]
        question = self._question(self.template, prompt, row)
        return opened(tokenizer, self.template.encoder.encode(question).ids.tolist())

    def pair(self, prompt: str, answer: str, row: Record) -> Pair:
        """Ids of the prompt and of an answer that is to be scored."""
        if self.template is None:
            pair = encode_pair(self.model.tokenizer, self.before + prompt, self.delimiter + answer)
        else:
            pair = encode_answer(self.template.encoder, self._question(self.template, prompt, row), answer)
        return _fitting(self.model, pair, answer, row)

    def _question(self, template: ChatTemplate, prompt: str, row: Record) -> list[Piece]:
        try:
            return template.asked([*self.turns, {"role": "user", "content": prompt}])
        except DataError as error:
            raise DataError(f"{row.where}: {error}. Use another model, or a task that it can be asked.") from None


def _prompts(model: LanguageModel, task: Task, solved: Sequence[tuple[str, str]], delimiter: str) -> _Prompts:
    config = task.config
    separator = "" if config.fewshot is None else config.fewshot.separator
    before = config.description + "".join(asked + delimiter + answer + separator for asked, answer in solved)
    turns = [{"role": "system", "content": config.description}] if config.description else []
    for asked, answer in solved:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return _Prompts(model, before, turns, delimiter, template_of(model) if config.chat else None)


def _fitting(model: LanguageModel, pair: Pair, continuation: str, row: Record) -> Pair:
    if not 0 < len(pair[1]) <= model.context:
        raise DataError(
            f"{row.where}: {continuation!r} has {len(pair[1])} tokens of its own after its prompt, and {model.path} "
            f"scores 1 to {model.context}."
        )
    return pair


def _cut_note(model: LanguageModel, pairs: Sequence[Pair]) -> tuple[str, ...]:
    lost = sum(is_cut(model, pair) for pair in pairs)
    if not lost:
        return ()
    return (f"{lost:,} of {len(pairs):,} contexts were cut from the left to fit the model's {model.context:,} tokens",)
