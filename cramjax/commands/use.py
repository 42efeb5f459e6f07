"""`cramjax generate`, `fill-mask`, `embed` and `evaluate`: what a model has learnt."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cramjax.commands.common import Parser, print_value, require_directories, write_json
from cramjax.commands.offload import generate_offloaded, is_offloaded, prompts_given
from cramjax.errors import ConfigError, DataError


def generate(words: Sequence[str]) -> None:
    """Continue prompts."""
    if is_offloaded(words):
        return generate_offloaded(words)
    parser = _run_parser(
        "generate",
        "Continue prompts with a trained causal model. For one that is larger than memory, see `cramjax generate "
        "--device_memory 2GiB --help`.",
    )
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="*", default=[], help="Texts to continue. Default: the empty text."
    )
    parser.add_argument(
        "--prompts", dest="file", metavar="FILE", help="Prompts: one a line, or JSON lines with a field `prompt`."
    )
    parser.add_argument("--max_tokens", type=int, default=128, help="Most tokens to add (default: %(default)s).")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)."
    )
    parser.add_argument("--top_k", type=int, default=None, help="Draw from this many likeliest tokens only.")
    parser.add_argument("--top_p", type=float, default=None, help="Draw from the likeliest tokens of this mass only.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (default: %(default)s).")
    parser.add_argument(
        "--chat", action="store_true", help="Prompts are what a user says; the model answers, by its chat template."
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"),
        default="auto",
        help="How weights are held: auto is the precision the model computes in; int8 and int4 round them, "
        "w8a8 and w4a8 activations to 8 bits too (default: %(default)s).",
    )
    parser.add_argument(
        "--lookup",
        type=int,
        default=0,
        help="Guess so many tokens at once where a text repeats itself; the answer is the same (default: none; 7 suits "
        "code and quotations).",
    )
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        default=None,
        help="A smaller model with the same tokenizer, that guesses tokens for this one to verify; the answer is the "
        "same.",
    )
    parser.add_argument(
        "--json_schema",
        metavar="SCHEMA",
        default=None,
        help="Texts are JSON of a schema: a file with it, or its text ({…}). Needs the extra `serve`.",
    )
    parser.add_argument("--regex", default=None, help="Texts are of a regular expression. Needs the extra `serve`.")
    parser.add_argument("--beams", type=int, default=None, help="Look for the likeliest text with so many beams.")
    parser.add_argument(
        "--length_penalty",
        type=float,
        default=None,
        help="Of --beams: log-probabilities are divided by the length to this power (default: 1).",
    )
    args = parser.parse_args(words)
    ways = ("temperature", "seed", "top_k", "top_p", "lookup", "draft", "json_schema", "regex")
    drawn = [name for name in ways if getattr(args, name) != parser.get_default(name)]
    if args.beams is not None and drawn:
        raise ConfigError(f"--beams draws nothing, and --{drawn[0]} says how to: give one. See `{parser.prog} --help`.")
    if args.beams is None and args.length_penalty is not None:
        raise ConfigError(f"--length_penalty is of a search: give --beams too. See `{parser.prog} --help`.")
    prompts = prompts_given(args.prompts, args.file) or [""]
    from cramjax.serve import BeamSearch, beam_search, generate
    from cramjax.training.given import load

    model = load(args.run, args.checkpoint)
    if args.beams is not None:
        search = BeamSearch(args.beams, 1.0 if args.length_penalty is None else args.length_penalty)
        options = {"max_tokens": args.max_tokens, "chat": args.chat, "weights": args.weights}
        found = beam_search(model, prompts, search, **options)
        texts = [("" if args.chat else prompt) + own[0].text for prompt, own in zip(prompts, found, strict=True)]
        print("\n\n".join(texts))
        return
    generations = generate(
        model,
        prompts,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        chat=args.chat,
        weights=args.weights,
        lookup=args.lookup,
        draft=args.draft,
        json_schema=_schema(args.json_schema),
        regex=args.regex,
        told=_in_order(["" for _ in prompts] if args.chat else prompts),
    )
    if args.lookup or args.draft:
        guessed, right = (sum(getattr(made, name) for made in generations) for name in ("guessed", "right"))
        print(f"{right} of {guessed} guesses were right.", file=sys.stderr)


def _schema(given: str | None) -> str | None:
    """The text of a JSON schema, given as that or as the path of a file."""
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json_schema must be a file, or the text of a schema, got {given!r} ({error}).") from None


def _in_order(beginnings: Sequence[str]) -> Callable[[int, str, bool], None]:
    """Prints texts that grow side by side one after the other, each as it comes.

    Args:
        beginnings: of the texts.
    """
    texts, ended = list(beginnings), [False] * len(beginnings)
    shown = 0

    def tell(number: int, piece: str, is_last: bool) -> None:
        nonlocal shown
        texts[number] += piece
        ended[number] = is_last
        while shown < len(texts):
            print(texts[shown], end="", flush=True)
            texts[shown] = ""
            if not ended[shown]:
                break
            shown += 1
            print("\n\n" if shown < len(texts) else "\n", end="", flush=True)

    return tell


def fill_mask(words: Sequence[str]) -> None:
    """Fill masks."""
    parser = _run_parser("fill-mask", "Fill each [MASK] of a text with a trained masked model.")
    parser.add_argument("text", metavar="TEXT", help="A text with [MASK] in it.")
    parser.add_argument("--top", type=int, default=5, help="Candidates shown per mask (default: %(default)s).")
    args = parser.parse_args(words)
    from cramjax.serve import fill_mask
    from cramjax.training.given import load

    print(fill_mask(load(args.run, args.checkpoint), args.text, top=args.top))


def embed(words: Sequence[str]) -> None:
    """Embed texts."""
    parser = _run_parser(
        "embed",
        "Make one vector of each text, by the pooling that the model says (sentence-transformers' files are read at "
        "import), else the mean over its tokens; of length 1.",
    )
    parser.add_argument(
        "--texts",
        metavar="FILE",
        required=True,
        help="A text a line; or rows: .jsonl, .csv, .tsv, .parquet, or a directory saved by datasets.",
    )
    parser.add_argument("--field", default="text", help="Of rows: which holds the text (default: %(default)s).")
    parser.add_argument("--out", metavar="FILE.npy", required=True, help="Where to write (texts, width), float32.")
    parser.add_argument(
        "--pooling", choices=("mean", "cls", "last"), default=None, help="Default: as the model says, else mean."
    )
    parser.add_argument("--cut", action="store_true", help="Cut texts that are too long, instead of refusing them.")
    args = parser.parse_args(words)
    if Path(args.out).suffix != ".npy":
        raise ConfigError(f"--out must be a .npy file, got {args.out!r}.")
    require_directories({"--out": args.out})
    import numpy as np
    from rich.console import Console

    from cramjax.formats.directory import new_file, require_new
    from cramjax.serve import embed
    from cramjax.show.live import ProgressDisplay
    from cramjax.training.given import load

    require_new(args.out)
    texts = list(_texts(args.texts, args.field))
    model = load(args.run, args.checkpoint)
    with ProgressDisplay(Console(stderr=True)) as tell:
        vectors = embed(
            model, texts, pooling=args.pooling, cut=args.cut, progress=lambda done, of: tell("texts", done, of)
        )
    with new_file(args.out) as file, file.open("wb") as stream:
        np.save(stream, vectors)
    print(f"{args.out}: {len(vectors):,} vectors of {vectors.shape[1]:,} numbers")


def _texts(file: str, field: str) -> Iterator[str]:
    """The texts of a file: its lines, or a field of its rows."""
    path = Path(file)
    if path.is_file() and path.suffix in ("", ".txt"):
        try:
            yield from path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{file} is not UTF-8 text: give a text file, or rows.") from None
        return
    from cramjax.evaluation.rows import read_rows

    for row in read_rows(file):
        yield row.text(field)


def evaluate(words: Sequence[str]) -> None:
    """Score text, or solve tasks."""
    parser = _run_parser(
        "evaluate",
        "Score a trained model: bits per byte, perplexity and accuracy of text; or, with --tasks, what it reaches in "
        "tasks over labelled data, with 95% intervals.",
    )
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", default=None, help="Text files. Default: a run's held-out text."
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        nargs="*",
        default=None,
        help="Labelled rows, for a model tuned on labels. Without a file: a run's held-out rows.",
    )
    parser.add_argument(
        "--fields",
        metavar="NAME=FIELD",
        nargs="+",
        default=[],
        help="Of --labels: what its fields are called where they are not text, label and, for a model tuned on pairs, "
        "pair: text=sentence label=class.",
    )
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=None, help="Names of tasks, or YAML files of tasks, instead."
    )
    parser.add_argument(
        "--data", metavar="TASK=FILE", nargs="+", default=[], help="Data of tasks that come without, or other data."
    )
    parser.add_argument("--limit", metavar="N", type=int, default=None, help="Most rows of each task. Default: all.")
    parser.add_argument(
        "--against",
        metavar="RUN",
        default=None,
        help="Another model for the same tasks or labels: are the two told apart?",
    )
    parser.add_argument("--json", metavar="OUT", default=None, help="Also write the scores to this file.")
    args = parser.parse_args(words)
    require_directories({"--json": args.json})
    if args.fields and args.labels is None:
        raise ConfigError(f"--fields is of labelled rows: give --labels too. See `{parser.prog} --help`.")
    if args.labels is not None:
        if args.text is not None or args.tasks is not None:
            raise ConfigError(f"--labels excludes --text and --tasks: give one. See `{parser.prog} --help`.")
        if wrong := [name for name in ("data", "limit") if getattr(args, name)]:
            raise ConfigError(f"--{wrong[0]} is of tasks, and --labels names its own files: leave it out.")
        if args.against is not None and not args.labels:
            raise ConfigError("--against compares two models on the same rows: name their files (--labels FILE).")
        _evaluate_labels(args)
    elif args.tasks is None:
        if wrong := [name for name in ("data", "limit", "against") if getattr(args, name)]:
            raise ConfigError(f"--{wrong[0]} is of tasks: give --tasks too. See `{parser.prog} --help`.")
        _evaluate_text(args)
    elif args.text is not None:
        raise ConfigError(f"--text and --tasks exclude each other: give one. See `{parser.prog} --help`.")
    else:
        _evaluate_tasks(args)


def _evaluate_text(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from cramjax.evaluation import evaluate_text
    from cramjax.training.given import load

    evaluation = evaluate_text(load(args.run, args.checkpoint), args.text)
    print(evaluation)
    if args.json:
        write_json(args.json, asdict(evaluation))


def _evaluate_labels(args: argparse.Namespace) -> None:
    from cramjax.evaluation import compare_on_labels, evaluate_labels
    from cramjax.training.given import load

    pairs = [word.partition("=") for word in args.fields]
    if wrong := [name for name, equals, field in pairs if not equals or not field]:
        raise ConfigError(f"--fields takes NAME=FIELD, such as text=sentence; got {wrong[0]!r}.")
    fields = {name: field for name, _, field in pairs} if pairs else None
    model = load(args.run, args.checkpoint)
    if args.against is None:
        scores = evaluate_labels(model, args.labels or None, fields=fields)
    else:
        scores = compare_on_labels(model, load(args.against, args.checkpoint), args.labels, fields=fields)
    print_value(scores)
    if args.json:
        write_json(args.json, scores.json())


def _evaluate_tasks(args: argparse.Namespace) -> None:
    from rich.console import Console

    from cramjax.evaluation import compare_on_tasks, evaluate_tasks
    from cramjax.evaluation.task import load_task
    from cramjax.show.live import ProgressDisplay
    from cramjax.training.given import load

    tasks = [load_task(task) for task in args.tasks]
    data = dict(_data_of(word, [task.name for task in tasks]) for word in args.data)
    model = load(args.run, args.checkpoint)
    other = None if args.against is None else load(args.against, args.checkpoint)
    with ProgressDisplay(Console(stderr=True)) as tell:
        if other is None:
            scores = evaluate_tasks(model, tasks, data=data, limit=args.limit, tell=tell)
        else:
            scores = compare_on_tasks(model, other, tasks, data=data, limit=args.limit, tell=tell)
    print_value(scores)
    if args.json:
        write_json(args.json, scores.json())


def _data_of(word: str, names: Sequence[str]) -> tuple[str, str]:
    """Task and file of one word of --data; where there is one task, the file alone is enough."""
    name, equals, file = word.partition("=")
    if equals and name in names:
        return name, file
    if len(names) == 1:
        return names[0], word
    raise ConfigError(f"--data takes TASK=FILE, where TASK is one of {', '.join(names)}; got {word!r}.")


def _run_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser of commands that read a model."""
    parser = Parser(prog=f"cramjax {command}", description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="A run directory or a model directory.")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="Of a run: the newest weights, or those with the lowest held-out bits per byte (default: %(default)s).",
    )
    return parser
