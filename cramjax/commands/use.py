"""`cramjax generate`, `fill-mask` and `evaluate`: what a model has learnt."""

import argparse
from collections.abc import Sequence

from cramjax.commands.common import Parser, write_json


def generate(words: Sequence[str]) -> None:
    """Continue prompts."""
    parser = _run_parser("generate", "Continue prompts with a trained causal model.")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="Texts to continue. Default: the empty text.")
    parser.add_argument("--max_tokens", type=int, default=128, help="Most tokens to add (default: %(default)s).")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)."
    )
    parser.add_argument("--top_k", type=int, default=None, help="Draw from this many likeliest tokens only.")
    parser.add_argument("--top_p", type=float, default=None, help="Draw from the likeliest tokens of this mass only.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (default: %(default)s).")
    args = parser.parse_args(words)
    from cramjax.serve import generate
    from cramjax.training.given import load

    generations = generate(
        load(args.run, args.checkpoint),
        args.prompts or [""],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print("\n\n".join(map(str, generations)))


def fill_mask(words: Sequence[str]) -> None:
    """Fill masks."""
    parser = _run_parser("fill-mask", "Fill each [MASK] of a text with a trained masked model.")
    parser.add_argument("text", metavar="TEXT", help="A text with [MASK] in it.")
    parser.add_argument("--top", type=int, default=5, help="Candidates shown per mask (default: %(default)s).")
    args = parser.parse_args(words)
    from cramjax.serve import fill_mask
    from cramjax.training.given import load

    print(fill_mask(load(args.run, args.checkpoint), args.text, top=args.top))


def evaluate(words: Sequence[str]) -> None:
    """Score text."""
    parser = _run_parser("evaluate", "Score text with a trained model: bits per byte, perplexity, accuracy.")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", default=None, help="Text files. Default: a run's held-out text."
    )
    parser.add_argument("--json", metavar="OUT", default=None, help="Also write the scores to this file.")
    args = parser.parse_args(words)
    from dataclasses import asdict

    from cramjax.evaluation import evaluate_text
    from cramjax.training.given import load

    evaluation = evaluate_text(load(args.run, args.checkpoint), args.text)
    print(evaluation)
    if args.json:
        write_json(args.json, asdict(evaluation))


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
