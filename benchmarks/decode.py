"""Tokens per second, one by one: CramJAX, transformers and ctranslate2, on the same weights, threads and greedy tokens.

Each contender is a process of its own with its own copy of the weights, loaded once; rounds take turns between them. A
round draws one token, then many, after the same prompt: the difference is what tokens cost. Peak memory is a process's
beyond what it held before it loaded its weights: while it decodes, and ever, loading and compiling included. What of it
is the runtime's (tokenizer, programs, what compiling them left) is found by a process that does the same with a model
of next to no weights; a process says itself what its weights take, and its pool of keys and values. What can be read of
memory is measured in the same rounds, by BLAS's product of a vector with a matrix of 256 MiB. The weights
are those of a model directory (--model), else random ones of SmolLM2-135M's shape. ctranslate2 is left out where it is
not installed (pip install ctranslate2); its int8 rounds activations too, so that CramJAX's `w8a8` is compared with it
as well. The last lines say what of the claims holds: shares of bandwidth, ratios to the fastest peer of the precision,
int4 against int8, peak memory less the pool's against weights, with the runtime's and without.

    python benchmarks/decode.py [--model DIR] [--quick] [--json PATH]
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = 16
TINY = "cramjax tiny"
CRAMJAX = ("float32", "bfloat16", "int8", "int4", "w8a8", "w4a8")
PEERS = ("transformers float32", "transformers bfloat16", "ctranslate2 float32", "ctranslate2 int8")
BATCHES = (1, 8)


def random_model(out: Path, quick: bool) -> None:
    """Write a model of SmolLM2-135M's shape with random weights."""
    import jax
    import jax.numpy as jnp

    from cramjax.config import ModelConfig, TokenizerConfig
    from cramjax.data.tokenizer import train_tokenizer
    from cramjax.language_model import LanguageModel, save_model
    from cramjax.model import make_model

    size = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp": 128} if quick else {"layers": 30, "width": 576}
    size = {"heads": 9, "kv_heads": 3, "mlp": 1536} | size
    config = ModelConfig(activation="swiglu", norm="rmsnorm", bias=False, positions="rotary", init_std=0.1, **size)
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the stack walks block by block. " * 20])
    model = make_model(config, vocab_size=512 if quick else 49152, sequence_length=2048, causal=True)
    params = jax.jit(model.init)(jax.random.key(0))
    # Only words that the vocabulary has are drawn: its own rows are far longer than the others.
    real = jnp.isin(jnp.arange(model.vocab_size), jnp.arange(5, tokenizer.vocab_size))
    table = params["embed"]["token"]["table"]
    params["embed"]["token"]["table"] = jnp.where(
        jnp.pad(real, (0, len(table) - len(real)))[:, None], table, table / 99
    )
    save_model(LanguageModel(out, "causal", tokenizer, 2048, model, params), out)


def next_to_nothing(given: Any) -> Any:
    """The same tokenizer, and a model of two narrow layers."""
    from dataclasses import replace

    import jax

    from cramjax.model import make_model

    config = replace(given.model.config, layers=2, width=64, heads=4, kv_heads=2, head_dim=None, mlp=128)
    model = make_model(config, vocab_size=given.model.vocab_size, sequence_length=2048, causal=True)
    return replace(given, model=model, params=jax.jit(model.init)(jax.random.key(0)))


def prepare(model: Path, work: Path) -> dict[str, Path]:
    """The same weights for each library."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from cramjax.language_model import load_model, save_model

    given = load_model(model)
    given.export(work / "hf")
    low = replace(
        given,
        params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), given.params),
        model=replace(given.model, param_dtype="bfloat16", compute_dtype="bfloat16"),
    )
    save_model(low, work / "bfloat16")
    save_model(next_to_nothing(given), work / "tiny")
    places = {"float32": model, "bfloat16": work / "bfloat16", "tiny": work / "tiny", "hf": work / "hf"}
    try:
        from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

        TransformersConverter(str(work / "hf")).convert(str(work / "ct2"))
        # A special token that a tokenizer lacks is null there, which cannot be read again: any word will do.
        settings, words = (work / "ct2" / name for name in ("config.json", "vocabulary.json"))
        word, known = json.loads(words.read_text(encoding="utf-8"))[0], json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(
            json.dumps({n: word if v is None and n.endswith("_token") else v for n, v in known.items()}),
            encoding="utf-8",
        )
        places["ct2"] = work / "ct2"
    except Exception as error:
        print(f"ctranslate2 is left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return places


def contender(name: str, places: dict[str, str], threads: int, prompt: list[int], counts: tuple[int, int]) -> None:
    """A process that answers each batch size on a line with seconds per token, its peak memory and its tokens."""
    library, precision = name.split()
    held: dict[str, int] = {}
    if library == "transformers":
        draw, before = _transformers(places["hf"], precision, threads, prompt)
    elif library == "ctranslate2":
        draw, before = _ctranslate2(places["ct2"], precision, threads, prompt)
    else:
        place = places[precision if precision in ("float32", "tiny") else "bfloat16"]
        draw, before, held = _cramjax(place, "float32" if name == TINY else precision, prompt)
    for batch in BATCHES:
        for count in counts:
            draw(batch, count)
    first = _peak()
    _forget_peak()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, tokens = [], []
        for count in counts:
            start = time.perf_counter()
            tokens = draw(int(line), count)
            seconds.append(time.perf_counter() - start)
        each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
        answer = {"seconds": each, "peak": _peak() - before, "ever": max(first, _peak()) - before, "tokens": tokens}
        print(json.dumps(answer | held), flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _forget_peak() -> None:
    """Give back what is free, and count the peak of resident memory from now on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _cramjax(place: str, precision: str, prompt: list[int]) -> tuple[Any, int, dict[str, int]]:
    import jax

    from cramjax.language_model import load_model
    from cramjax.serve.decoding import for_decoding
    from cramjax.serve.generate import draws
    from cramjax.serve.sampling import Sampling

    jax.block_until_ready(jax.numpy.ones(8))
    before = _resident()
    given = for_decoding(load_model(place), precision)
    gc.collect()
    held = {"weights": _of_arrays(), "pool": 0}

    def draw(batch: int, count: int) -> list[int]:
        rows = [list(prompt) for _ in range(batch)]
        for _ in draws(given, rows, count, Sampling(temperature=0.0), 0):
            held["pool"] = max(held["pool"], _of_arrays() - held["weights"])
        return rows[0][len(prompt) :]

    return draw, before, held


def _of_arrays() -> int:
    import jax

    # Arrays may be the same memory.
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}.values())


def _transformers(place: str, precision: str, threads: int, prompt: list[int]) -> tuple[Any, int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    before = _resident()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, precision)).eval()

    def draw(batch: int, count: int) -> list[int]:
        ids = torch.tensor([prompt] * batch)
        options: Any = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[0, len(prompt) :].tolist()

    return draw, before


def _ctranslate2(place: str, precision: str, threads: int, prompt: list[int]) -> tuple[Any, int]:
    import ctranslate2  # pyright: ignore[reportMissingImports]

    vocabulary = json.loads((Path(place) / "vocabulary.json").read_text(encoding="utf-8"))
    before = _resident()
    options: Any = {"compute_type": precision, "inter_threads": 1, "intra_threads": threads}
    generator = ctranslate2.Generator(place, device="cpu", **options)
    words = [vocabulary[token] for token in prompt]

    def draw(batch: int, count: int) -> list[int]:
        lengths = {"max_length": count, "min_length": count}
        results = generator.generate_batch([words] * batch, include_prompt_in_result=False, **lengths)
        return results[0].sequences_ids[0]

    return draw, before


def bandwidth() -> float:
    """Bytes per second that BLAS reads of a matrix larger than caches."""
    import numpy as np

    matrix, vector = np.ones((8192, 8192), np.float32), np.ones(8192, np.float32)
    fastest = 0.0
    for _ in range(4):
        start = time.perf_counter()
        matrix @ vector
        fastest = max(fastest, matrix.nbytes / (time.perf_counter() - start))
    return fastest


def measure(places: dict[str, Path], rounds: int, threads: int, counts: tuple[int, int]) -> dict[str, Any]:
    """Medians over rounds in which all contenders take turns."""
    prompt = list(range(5, 5 + PROMPT))
    names = [TINY, *(f"cramjax {precision}" for precision in CRAMJAX)]
    names += [name for name in PEERS if not name.startswith("ctranslate2") or "ct2" in places]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    settings = json.dumps([{k: str(v) for k, v in places.items()}, threads, prompt, counts])
    running: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, dict[int, list[dict[str, Any]]]] = {}
    speeds = []
    try:
        for name in names:
            command = [sys.executable, os.path.abspath(__file__), "--contender", name, "--settings", settings]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            child = subprocess.Popen(command, env=environment, **pipes)
            if _answer(child) != "ready":
                print(f"{name} is left out: it ended with {child.wait()}", file=sys.stderr)
                continue
            running[name], samples[name] = child, {batch: [] for batch in BATCHES}
        for _ in range(rounds):
            speeds.append(bandwidth())
            for batch in BATCHES:
                for name, child in running.items():
                    assert child.stdin is not None
                    print(batch, file=child.stdin, flush=True)
                    if not (answer := _answer(child)):
                        raise SystemExit(f"{name} ended with {child.wait()} in the middle: it has no figures.")
                    samples[name][batch].append(json.loads(answer))
    finally:
        for child in running.values():
            child.terminate()
    return _summary(samples, statistics.median(speeds)) | {
        "threads": threads,
        "rounds": rounds,
        "load": os.getloadavg(),
    }


def _answer(child: "subprocess.Popen[str]") -> str:
    """The next line that is an answer; libraries print others."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "ready" or line.startswith('{"seconds"'):
            return line.strip()
    return ""


def _summary(samples: dict[str, dict[int, list[dict[str, Any]]]], speed: float) -> dict[str, Any]:
    rows = {}
    for name, batches in samples.items():
        rows[name] = {
            "tokens_per_second": {b: b / statistics.median(s["seconds"] for s in own) for b, own in batches.items()},
            "peak_bytes": max(s["peak"] for own in batches.values() for s in own),
            "ever_bytes": max(s["ever"] for own in batches.values() for s in own),
            "tokens": batches[BATCHES[0]][-1]["tokens"],
        }
        last = batches[BATCHES[-1]][-1]
        rows[name] |= {f"{part}_bytes": last[part] for part in ("weights", "pool") if part in last}
    return {"bandwidth": speed, "contenders": rows}


def report(result: dict[str, Any], matrices: int) -> None:
    """Print a table: tokens per second, ratio to the fastest peer of the precision, share of the bandwidth, memory."""
    rows = result["contenders"]
    print(f"memory is read at {result['bandwidth'] / 1e9:.1f} GB/s; load {result['load'][0]:.1f}")
    print(f"the runtime takes {_runtime(rows[TINY]) / 2**20:.0f} MiB beside weights and pool")
    for name, row in rows.items():
        if name == TINY:
            continue
        library, precision = name.split()
        peers = _peers(rows, precision)
        words = [f"{name:24}"]
        for batch, speed in row["tokens_per_second"].items():
            words.append(f"batch {batch}: {speed:8.1f} tokens/s")
            if library == "cramjax" and peers:
                words.append(f"({speed / max(r['tokens_per_second'][batch] for r in peers):.2f} × the fastest peer)")
        share = _share(result, name, matrices)
        words.append(f"{share:.0%} of bandwidth, peak {row['peak_bytes'] / 2**20:.0f} MiB")
        if "pool_bytes" in row:
            words.append(f"of weights {row['weights_bytes'] / 2**20:.0f}, of the pool {row['pool_bytes'] / 2**20:.0f}")
        words.append(f"({row['ever_bytes'] / 2**20:.0f} with loading)")
        same = next((n for n, r in rows.items() if n == f"cramjax {precision}"), None)
        if library != "cramjax" and same:
            equal = sum(a == b for a, b in zip(row["tokens"], rows[same]["tokens"], strict=False))
            words.append(f"{equal} of {len(row['tokens'])} tokens are CramJAX's")
        print("  ".join(words))
    for claim, value in claims(result, matrices).items():
        print(f"{claim}: {value:.2f}")


SIZES = {
    "float32": 4,
    "bfloat16": 2,
    "int8": 1 + 1 / 16,
    "int4": 0.5 + 1 / 16,
    "w8a8": 1 + 1 / 16,
    "w4a8": 0.5 + 1 / 16,
}
"""Bytes of a weight, its share of a scale among them."""


def claims(result: dict[str, Any], matrices: int) -> dict[str, float]:
    """What is demanded of each, as ratios."""
    rows: dict[str, Any] = result["contenders"]
    found = {}
    for precision in ("bfloat16", "int8"):
        found[f"{precision}, batch 1, of memory's bandwidth (0.70 or more)"] = _share(
            result, f"cramjax {precision}", matrices
        )
    for precision in CRAMJAX:
        own, peers = rows[f"cramjax {precision}"]["tokens_per_second"], _peers(rows, precision)
        for batch in BATCHES if peers else ():
            fastest = max(peer["tokens_per_second"][batch] for peer in peers)
            found[f"{precision}, batch {batch}, times the fastest peer (1.20 or more)"] = own[batch] / fastest
    for batch in BATCHES:
        four, eight = (rows[f"cramjax {name}"]["tokens_per_second"][batch] for name in ("int4", "int8"))
        found[f"int4 times int8, batch {batch} (above 1)"] = four / eight
    runtime = _runtime(rows[TINY])
    for precision in CRAMJAX:
        row = rows[f"cramjax {precision}"]
        peak, size = row["peak_bytes"] - row["pool_bytes"], row["weights_bytes"]
        found[f"{precision}, peak memory less the pool over weights"] = peak / size
        found[f"{precision}, the same without the runtime (1.20 or less)"] = (peak - runtime) / size
    return found


def _runtime(tiny: dict[str, Any]) -> int:
    """Bytes that are neither weights nor pool: the tokenizer, programs, and what compiling them left."""
    return tiny["peak_bytes"] - tiny["pool_bytes"] - tiny["weights_bytes"]


def _peers(rows: dict[str, Any], precision: str) -> list[dict[str, Any]]:
    same = "int8" if precision == "w8a8" else precision
    return [row for name, row in rows.items() if name.endswith(same) and not name.startswith("cramjax")]


def _share(result: dict[str, Any], name: str, matrices: int) -> float:
    speed = result["contenders"][name]["tokens_per_second"][BATCHES[0]]
    return speed * matrices * SIZES.get(name.split()[1], 4) / result["bandwidth"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--contender", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--settings", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contender(args.contender, *json.loads(args.settings))
        return
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        model = args.model
        if model is None:
            model = work / "model"
            random_model(model, args.quick)
        places = prepare(model, work)
        result = measure(places, 1 if args.quick else 5, threads, (1, 5) if args.quick else (1, 33))
        matrices = sum(file.stat().st_size for file in places["float32"].glob("*.safetensors")) // 4
    report(result, matrices)
    if args.json:
        result["claims"] = claims(result, matrices)
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
