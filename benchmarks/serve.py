"""A served model under load: requests that arrive at random (Poisson), of lengths that differ (log-normal), seeded.

A server of its own is started on the model (default: a random Llama of a few million parameters), asked at the given
rate, and asked again as fast as it answers; both give the times that a client sees:

- ttft: from the request to its first token, seconds;
- itl: between two tokens, seconds;
- e2e: from the request to its last token, seconds;
- throughput: tokens drawn a second, all requests together;
- goodput: requests a second whose first token came within `--ttft` and whose others came within `--itl` on average.

Then the server ends, and its engine alone, in a process of its own, gets the requests that came all at once: the
server's throughput as a share of that is `share_of_engine`. The best of `--rounds` rounds counts, of either.

    python benchmarks/serve.py [MODEL] [--rate 2] [--requests 64] [--quick] [--json PATH]
"""

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

_LONGEST = 96
"""Tokens of prompt or answer, so that both fit small contexts."""
_TOKENS = 200
"""Ids of prompts are below it: every vocabulary has so many."""


@dataclass
class Timed:
    """One request, seconds since its start."""

    prompt: int
    asked: int
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    drawn: int = 0
    failed: str | None = None


def workload(number: int, rate: float, seed: int) -> list[tuple[float, int, int]]:
    """When each request arrives (seconds), tokens of its prompt, and tokens asked for."""
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(1 / rate, number)) if rate else np.zeros(number)
    prompts, answers = (np.clip(draw.lognormal(mean, 0.6, number), 4, _LONGEST).astype(int) for mean in (3.2, 3.2))
    return [(float(at), int(p), int(a)) for at, p, a in zip(arrivals, prompts, answers, strict=True)]


async def ask(client: httpx2.AsyncClient, at: float, prompt: int, asked: int, seed: int) -> Timed:
    """Send one request when it is due, and read its stream."""
    await asyncio.sleep(at)
    timed = Timed(prompt, asked)
    ids = np.random.default_rng(seed).integers(0, _TOKENS, prompt).tolist()
    body = {"prompt": ids, "max_tokens": asked, "seed": seed, "stream": True, "ignore_eos": True}
    body |= {"return_token_ids": True}
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            timed.failed = f"{answer.status_code}: {(await answer.aread())[:200]!r}"
            return timed
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now = json.loads(line.removeprefix("data: ")), time.perf_counter() - began
            if "error" in chunk:
                timed.failed = chunk["error"]["message"]
                return timed
            count = sum(len(choice["token_ids"]) for choice in chunk["choices"])
            if count and timed.drawn:
                timed.gaps += [(now - timed.last) / count] * count
            elif count:
                timed.first = now
            timed.drawn, timed.last = timed.drawn + count, now
    return timed


async def measure(url: str, load: list[tuple[float, int, int]]) -> tuple[float, list[Timed]]:
    """Seconds of the whole, and each request."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        asked = [ask(client, *one, seed) for seed, one in enumerate(load)]
        timed = await asyncio.gather(*asked)
        return time.perf_counter() - began, list(timed)


def summary(seconds: float, timed: list[Timed], ttft: float, itl: float) -> dict[str, Any]:
    """What is reported of one run."""
    done = [one for one in timed if one.failed is None]
    good = [one for one in done if one.first <= ttft and (not one.gaps or float(np.mean(one.gaps)) <= itl)]

    def spread(values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        return {"mean": float(np.mean(values)), **{f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}}

    return {
        "requests": len(timed),
        "failed": len(timed) - len(done),
        "seconds": seconds,
        "ttft": spread([one.first for one in done]),
        "itl": spread([gap for one in done for gap in one.gaps]),
        "e2e": spread([one.last for one in done]),
        "throughput": sum(one.drawn for one in done) / seconds,
        "goodput": len(good) / seconds,
    }


def offline(model: str, options: list[str], load: list[tuple[float, int, int]], rounds: int) -> float:
    """Tokens a second of the engine alone, on the requests of a load that came all at once."""
    from cramjax.serve.decoding import for_decoding
    from cramjax.serve.engine import Engine
    from cramjax.serve.request import Request, SamplingParameters
    from cramjax.serving import EngineConfig
    from cramjax.training.given import language_model

    given = dict(word.removeprefix("--engine.").split("=") for word in options if word.startswith("--engine."))
    slots = int(given.get("slots", EngineConfig().slots))
    engine = Engine(for_decoding(language_model(model)), EngineConfig(slots=slots, context=2 * _LONGEST)).prepare()
    fastest = 0.0
    for _ in range(rounds):
        began, drawn = time.perf_counter(), engine.load().drawn_tokens
        for seed, (_, prompt, asked) in enumerate(load):
            ids = np.random.default_rng(seed).integers(0, _TOKENS, prompt).tolist()
            engine.add(Request(tuple(ids), asked, SamplingParameters(seed=seed)), lambda _: None)
        while engine.step():
            pass
        fastest = max(fastest, (engine.load().drawn_tokens - drawn) / (time.perf_counter() - began))
    return fastest


def random_model(out: Path, quick: bool) -> Path:
    """A model directory of a Llama with random weights."""
    import jax

    from cramjax.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig
    from cramjax.data.tokenizer import make_tokenizer
    from cramjax.language_model import LanguageModel, save_model
    from cramjax.training.parts import build_model

    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    size = {"layers": 2, "width": 32, "heads": 2, "mlp": 64} if quick else {"layers": 6, "width": 256, "heads": 4}
    config = ModelConfig(**size, norm="rmsnorm", activation="swiglu", positions="rotary")
    model = build_model(RunConfig(model=config, data=DataConfig(sequence_length=2 * _LONGEST)), tokenizer)
    params = model.init(jax.random.key(0))
    return save_model(LanguageModel(out, "causal", tokenizer, 2 * _LONGEST, model, params), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="A run or a model directory. Default: random weights.")
    parser.add_argument("--rate", type=float, default=2.0, help="Requests a second (default: %(default)s).")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="Of all requests at once (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft", type=float, default=1.0, help="Of goodput, seconds (default: %(default)s).")
    parser.add_argument("--itl", type=float, default=0.1, help="Of goodput, seconds (default: %(default)s).")
    parser.add_argument("--quick", action="store_true", help="Few requests to a tiny model.")
    parser.add_argument("--json", metavar="PATH", help="Also write the figures to this file.")
    parser.add_argument(
        "--option", action="append", default=[], help="Of `cramjax serve`: --option=--engine.slots=16 (repeatable)."
    )
    args = parser.parse_args()
    number = 8 if args.quick else args.requests
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or str(random_model(Path(directory) / "random", args.quick))
        command = [sys.executable, "-m", "cramjax.cli", "serve", model, "--port=0", "--queue=4096"]
        command += ["--queue_tokens=1000000", f"--engine.context={2 * _LONGEST}", *args.option]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        try:
            assert server.stderr is not None
            said = next((line for line in server.stderr if " is at http://" in line), None)
            if said is None:
                raise SystemExit(f"{' '.join(command)} has ended before it served: try it alone.")
            url = said.split()[-1]
            found: dict[str, Any] = {}
            for name, rate in (("poisson", args.rate), *[("saturated", 0.0)] * args.rounds):
                seconds, timed = asyncio.run(measure(url, workload(number, rate, args.seed)))
                one_run = summary(seconds, timed, args.ttft, args.itl) | {"rate": rate or None}
                if one_run["throughput"] >= found.get(name, {"throughput": 0.0})["throughput"]:
                    found[name] = one_run
                for one in timed:
                    if one.failed:
                        print(asdict(one), file=sys.stderr)
        finally:
            server.terminate()
            server.communicate()
        # A process of its own, as the server's: what this one has allocated and computed before is not to count.
        given = model, args.option, workload(number, 0.0, args.seed), args.rounds
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            alone = fresh.submit(offline, *given).result()
        found |= {"engine_throughput": alone, "share_of_engine": found["saturated"]["throughput"] / alone}
    print(json.dumps(found, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
