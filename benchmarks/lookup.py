"""Prompt look-up: how much sooner the same answer is there where a text repeats itself.

Beginnings of modules of the standard library, continued greedily by two engines over one model, one that guesses from
how the text went on before and one that does not; they take turns. Equal tokens are demanded, but for ties: calls of
several tokens sum in another order, and where two tokens are as likely to the last bits, either may be drawn.

    python benchmarks/lookup.py MODEL [--lookup 7] [--tokens 128] [--weights auto] [--json PATH]
"""

import argparse
import json
import statistics
import sysconfig
import time
from pathlib import Path

from cramjax.serve.decoding import for_decoding
from cramjax.serve.engine import Engine
from cramjax.serve.request import Progress, Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training.given import language_model, load

MODULES = ("argparse", "dataclasses", "shutil", "statistics", "string", "textwrap", "turtle", "zipfile")


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A run or a model directory.")
    parser.add_argument("--lookup", type=int, default=7, help="Tokens guessed at once.")
    parser.add_argument("--prompt", type=int, default=256, help="Tokens of each module that are read.")
    parser.add_argument("--tokens", type=int, default=128, help="Tokens drawn after them.")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    model = for_decoding(language_model(load(args.model)), args.weights)
    context = args.prompt + args.tokens
    engines = {
        lookup: Engine(model, EngineConfig(slots=1, context=context, prefix_cache=False, lookup=lookup)).prepare()
        for lookup in (0, args.lookup)
    }
    library = Path(sysconfig.get_path("stdlib"))
    rows = []
    for module in MODULES:
        text = (library / f"{module}.py").read_text(encoding="utf-8")
        prompt = tuple([*model.tokenizer.opening(), *model.tokenizer.encode(text)][: args.prompt])
        seconds, answers = {}, {}
        for lookup, engine in engines.items():
            before = engine.load()
            seconds[lookup], answers[lookup] = answered(engine, prompt, args.tokens)
            after = engine.load()
        guessed, right = (getattr(after, n) - getattr(before, n) for n in ("guessed_tokens", "right_guesses"))
        ratio, equal = seconds[0] / seconds[args.lookup], answers[0] == answers[args.lookup]
        rows.append({"module": module, "ratio": ratio, "equal": equal, "guessed": guessed, "right": right})
        print(
            f"{module:12} {seconds[0]:6.2f} s, {seconds[args.lookup]:6.2f} s: {ratio:.2f} times, "
            f"{right} of {guessed} guesses right, {'equal' if equal else 'a tie drawn otherwise'}",
            flush=True,
        )
    ratios = [row["ratio"] for row in rows]
    print(f"median {statistics.median(ratios):.2f} times, {min(ratios):.2f} to {max(ratios):.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"options": vars(args) | {"json": None}, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


def answered(engine: Engine, prompt: tuple[int, ...], tokens: int) -> tuple[float, list[int]]:
    """Seconds from the first token to the last, and the tokens."""
    got: list[tuple[float, Progress]] = []
    request = Request(prompt, tokens, SamplingParameters(temperature=0.0))
    engine.add(request, lambda progress: got.append((time.perf_counter(), progress)))
    while engine.step():
        pass
    return got[-1][0] - got[0][0], [token for _, progress in got for token in progress.tokens]


if __name__ == "__main__":
    main()
