"""How fast is text prepared, and in how much memory? Reading, cleaning, training a tokenizer, tokenizing and writing.

The corpus is the standard library's source many times over, each time with a fifth of its identifiers renamed, so that
no copy is a duplicate and the vocabulary of words keeps growing. A fresh process prepares it. Printed for each
configuration: megabytes of text per second of processor time (MB/s a core), the most memory used above that of a bare
interpreter, and the speed of tokenizing alone over that of its peer, `encode_batch_fast` of the tokenizers library.

    python benchmarks/prepare.py [--quick] [--json PATH]
"""

import argparse
import json
import multiprocessing
import random
import re
import tempfile
import threading
import time
from pathlib import Path

import psutil

CONFIGURATIONS = {
    "bpe 4096": ({}, {"kind": "bpe", "vocab_size": 4096}),
    "crammed wordpiece 32768": (
        {"normalize": "ascii_lower", "max_tokens_per_char": 0.25},
        {"kind": "wordpiece", "vocab_size": 32768},
    ),
}
LIMIT_MB = 1000.0
LIMIT_MB_PER_SECOND = 3.0


def write_corpus(path: Path, megabytes: int) -> None:
    """Write JSON lines with that much text; a pure function of the Python version."""
    from cramjax.config import DataConfig
    from cramjax.data.sources import find_sources, read_documents

    texts = [document.text for document in read_documents(find_sources("stdlib"), DataConfig())]
    identifier, draw = re.compile(r"[A-Za-z_]{4,}"), random.Random(0)

    def invent() -> str:
        return "".join(draw.choice("bcdfghklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(2, 5)))

    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            text = texts[draw.randrange(len(texts))]
            names = sorted(set(identifier.findall(text)))
            renamed = {
                name: draw.choice(names) if draw.random() < 0.8 else invent()
                for name in draw.sample(names, len(names) // 5)
            }
            text = identifier.sub(lambda match, to=renamed: to.get(match.group(), match.group()), text)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def measure(corpus: Path, cache: Path, name: str) -> dict[str, float | str]:
    """Prepare the corpus in this process, which should have done nothing else before."""
    from cramjax.devices import keep_freed_memory

    keep_freed_memory()  # as every run does before it prepares its data
    process = psutil.Process()
    bare = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    from cramjax.config import DataConfig, TokenizerConfig
    from cramjax.data import prepare

    data, tokenizer = CONFIGURATIONS[name]
    started, cpu = time.monotonic(), time.process_time()
    prepared = prepare(DataConfig(str(corpus), cache_dir=str(cache), **data), TokenizerConfig(**tokenizer))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    done.set()
    watcher.join()
    megabytes = prepared.report["stages"]["read"]["bytes"] / 1e6
    return {
        "configuration": name,
        "megabytes": megabytes,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "megabytes_per_second_per_core": megabytes / cpu,
        "extra_memory_megabytes": (peak - bare) / 1e6,
        "tokenizing_over_library": tokenizing_ratio(corpus, cache, name),
    }


def tokenizing_ratio(corpus: Path, cache: Path, name: str, megabytes: int = 8) -> float:
    """Speed of tokenizing documents here over that of the tokenizers library: processor time, same text and batches."""
    from cramjax.config import DataConfig, TokenizerConfig
    from cramjax.data import normalize, prepare

    data, tokenizer = CONFIGURATIONS[name]
    config = DataConfig(str(corpus), cache_dir=str(cache), **data)
    mine = prepare(config, TokenizerConfig(**tokenizer)).tokenizer
    texts, size = [], 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            texts.append(normalize(json.loads(line)["text"], config.normalize))
            size += len(texts[-1])
            if size > megabytes * 1_000_000:
                break
    batches = [texts[start : start + 50] for start in range(0, len(texts), 50)]
    library = mine.backend
    library.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
    times = []
    for encode in (mine.encode_batch, lambda batch: [e.ids for e in library.encode_batch_fast(batch)]):
        started = time.process_time()
        for batch in batches:
            encode(batch)
        times.append(time.process_time() - started)
    return times[1] / times[0]


def main() -> None:
    """Make the corpus, prepare it in each configuration, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="25 MB instead of 250; training the tokenizer then weighs ten times as much",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, 25 if arguments.quick else 250)
        for name in CONFIGURATIONS:
            with context.Pool(1) as pool:
                rows.append(row := pool.apply(measure, (corpus, Path(folder) / "cache", name)))
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    speed = min(row["megabytes_per_second_per_core"] for row in rows)
    memory = max(row["extra_memory_megabytes"] for row in rows)
    print(
        f"slowest {speed:.1f} MB/s a core (needed: {LIMIT_MB_PER_SECOND:g}), most memory {memory:.0f} MB ({LIMIT_MB:g})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
