"""What do keys and values of fewer bits cost a text, and how many more tokens does the same memory hold?

Beginnings of pieces of a held-out text are scored by engines over one model that differ in `cache_bits` alone: bits per
byte, in all and from the second page on (the first one is never in codes), and tokens of a pool in the same memory.

    python benchmarks/cache_bits.py MODEL --text HELD_OUT [--tokens 512] [--rows 4] [--page 64] [--json PATH] [--quick]
"""

import argparse
import gzip
import json
import math
from pathlib import Path

from cramjax.serve.engine import Engine
from cramjax.serve.engine.programs import default_tokens
from cramjax.serve.request import Progress, Request, SamplingParameters
from cramjax.serving import EngineConfig
from cramjax.training.given import language_model, load


def main() -> None:
    """Run, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A run or a model directory.")
    parser.add_argument("--text", type=Path, required=True, help="Text to score, plain or gzipped.")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens of a row.")
    parser.add_argument("--rows", type=int, default=4, help="Rows, from places all over the text.")
    parser.add_argument("--page", type=int, default=64, help="Tokens of a page.")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="One row.")
    args = parser.parse_args()
    model = language_model(load(args.model))
    opened = gzip.open if args.text.suffix == ".gz" else open
    with opened(args.text, "rt", encoding="utf-8") as file:
        text = file.read()
    count = 1 if args.quick else args.rows
    rows = []
    for number in range(count):
        start = text.find("\n", len(text) * number // count) + 1
        tokens = model.tokenizer.encode(text[start : start + 8 * args.tokens])
        rows.append([*model.tokenizer.opening(), *tokens][: args.tokens])
    found, sizes = [], (args.tokens, 4, args.page)
    for bits in (None, 8, 4, 2):
        config = EngineConfig(
            slots=1, context=args.tokens, page=args.page, cache_tokens=args.tokens, cache_bits=bits, prefix_cache=False
        )
        engine = Engine(model, config)
        lost, size, later, later_size = 0.0, 0, 0.0, 0
        for row in rows:
            got: list[Progress] = []
            way = SamplingParameters(temperature=0.0)
            engine.add(Request(tuple(row), 0, way, top_logprobs=0, prompt_logprobs=True), got.append)
            while engine.step():
                pass
            each = [-scored.logprob / math.log(2) for p in got for scored in p.prompt_logprobs[1:] if scored.logprob]
            bytes_of = [len(model.tokenizer.decode(row[:n]).encode()) for n in (1, args.page, len(row))]
            lost, size = lost + sum(each), size + bytes_of[2] - bytes_of[0]
            later, later_size = later + sum(each[args.page - 1 :]), later_size + bytes_of[2] - bytes_of[1]
        found.append(
            {
                "bits": bits or "in full",
                "bits_per_byte": lost / size,
                "from_the_second_page": later / later_size,
                "tokens_in_the_same_memory": default_tokens(model.model, *sizes, bits=bits) / (4 * args.tokens),
                "bytes": size,
            }
        )
        first, own = found[0], found[-1]
        print(
            f"{own['bits']!s:8} {own['bits_per_byte']:.4f} ({own['bits_per_byte'] / first['bits_per_byte'] - 1:+.2%}), "
            f"from the second page {own['from_the_second_page']:.4f} "
            f"({own['from_the_second_page'] / first['from_the_second_page'] - 1:+.2%}), "
            f"{own['tokens_in_the_same_memory']:.2f} times the tokens; {size} bytes",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
