"""Generation with a model of twice the bytes of the memory that it may take: block schedule, plan and memory.

A model with random weights is written, and generates in processes of their own: with the policy that is planned and all
streams overlapped, and with the same placement one batch at a time, nothing overlapped. Both take turns. The plan's
tokens per second, the measured ones, and the most memory that each process took above what it had before it read the
model, with its programs compiled, are printed; and all that it took.

    python benchmarks/offload_generate.py [--quick] [--json PATH] [--disk DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_SIZES = {
    # layers, width, vocabulary, prompts, tokens of a prompt, tokens drawn, rounds
    "full": (24, 1024, 8192, 64, 32, 32, 2),
    "quick": (12, 1024, 4096, 64, 16, 16, 1),
}


def make(path: Path, layers: int, width: int, vocabulary: int) -> int:
    """Write a model; its bytes."""
    import jax

    from cramjax.config import ModelConfig, TokenizerConfig
    from cramjax.data.tokenizer import train_tokenizer
    from cramjax.language_model import LanguageModel
    from cramjax.model import make_model

    words = (f"word{number} and {number * 7919 % 100003}" for number in range(40000))
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=vocabulary), words)
    config = ModelConfig(layers=layers, width=width, heads=width // 64, mlp=4 * width)
    model = make_model(
        config,
        vocab_size=tokenizer.vocab_size,
        sequence_length=512,
        causal=True,
        separator_id=tokenizer.separator_id,
    )
    made = LanguageModel(path, "causal", tokenizer, 512, model, model.init(jax.random.key(0)))
    made.save(path)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(made.params))


def generate(
    path: str, disk: str, schedule: str, limits: tuple[int, int], prompts: int, tokens: int, drawn: int
) -> dict[str, Any]:
    """Plan and generate, in this process."""
    import gc

    import numpy as np
    import psutil

    from cramjax.cache import cache_directory
    from cramjax.devices import return_freed_memory
    from cramjax.offloading import OffloadConfig
    from cramjax.serve.offload.plan import make_plan, setting_of
    from cramjax.serve.offload.run import one_batch_at_a_time, open_stored, opened
    from cramjax.serve.sampling import Sampling

    (cache_directory() / "offload.json").unlink(missing_ok=True)  # its constants are measured now
    config = OffloadConfig(device_memory=str(limits[0]), host_memory=str(limits[1]), disk=disk)
    stored = open_stored(path)
    setting = setting_of(stored, config)
    process, most, done = psutil.Process(), [0], threading.Event()
    start = process.memory_info().rss
    rows = np.random.default_rng(0).integers(10, stored.model.tokenizer.vocab_size - 10, (prompts, tokens)).tolist()
    plan = make_plan(setting, config, [tokens] * prompts, drawn)
    if schedule == "in_turn":
        rows = rows[: 2 * plan.policy.batch]  # each batch takes as long as the others
        used = one_batch_at_a_time(plan)
    else:
        used = plan

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], process.memory_info().rss)
            time.sleep(0.01)

    with opened(setting, used, schedule=schedule) as session:  # pyright: ignore[reportArgumentType]
        session.generate(rows[: plan.policy.batch], 2, Sampling(0.0), 0)
        programs = session.walk.programs  # which are compiled now
    del session
    gc.collect()
    return_freed_memory()
    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with opened(setting, used, schedule=schedule) as session:  # pyright: ignore[reportArgumentType]
            session.walk.programs._compiled.update(programs._compiled)
            began = time.perf_counter()
            made = session.generate(rows, drawn, Sampling(0.0), 0)
            seconds = time.perf_counter() - began
    finally:
        done.set()
        thread.join()
    return {
        "tokens_per_second": sum(map(len, made)) / seconds,
        "seconds": seconds,
        "loading_seconds": session.loading_seconds,
        "rss_start": start,
        "rss_before": before,
        "rss_peak": most[0],
        "plan": plan.json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A smaller model, and one round.")
    parser.add_argument("--json", metavar="PATH", help="Also write the figures to this file.")
    parser.add_argument("--disk", metavar="DIR", default=None, help="Where the model lies. Default: a temporary one.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        asked = json.loads(args.child)
        result = (
            generate(**asked["generate"]) if "generate" in asked else {"bytes": make(Path(asked["to"]), *asked["size"])}
        )
        print(json.dumps(result))
        return
    layers, width, vocabulary, prompts, tokens, drawn, rounds = _SIZES["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(dir=args.disk) as directory:
        path = f"{directory}/model"
        size = child({"to": path, "size": (layers, width, vocabulary)})["bytes"]
        limits = int(size * 0.3), int(size * 0.2)
        common = {
            "path": path,
            "disk": directory,
            "limits": limits,
            "prompts": prompts,
            "tokens": tokens,
            "drawn": drawn,
        }
        found: dict[str, list[dict[str, Any]]] = {"overlapped": [], "in_turn": []}
        for _ in range(rounds):
            for schedule, results in found.items():
                results.append(child({"generate": {**common, "schedule": schedule}}))
    report = summary(size, limits, found)
    for name, value in report.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps({"summary": report, "rounds": found}, indent=1), encoding="utf-8")


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own gives."""
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(size: int, limits: tuple[int, int], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    best = {name: max(results, key=lambda r: r["tokens_per_second"]) for name, results in found.items()}
    block = best["overlapped"]
    growth = max(r["rss_peak"] - r["rss_before"] for r in found["overlapped"])
    return {
        "model_mib": size / 2**20,
        "device_mib": limits[0] / 2**20,
        "host_mib": limits[1] / 2**20,
        "batch x batches": f"{block['plan']['batch']} x {block['plan']['batches']}",
        "tokens_per_second": block["tokens_per_second"],
        "planned_tokens_per_second": block["plan"]["tokens_per_second"],
        "measured_over_planned": block["tokens_per_second"] / block["plan"]["tokens_per_second"],
        "one_batch_in_turn": best["in_turn"]["tokens_per_second"],
        "ratio": block["tokens_per_second"] / best["in_turn"]["tokens_per_second"],
        "growth_mib": growth / 2**20,
        "growth_over_limits": growth / sum(limits),
        "rss_start_mib": block["rss_start"] / 2**20,
        "rss_before_mib": block["rss_before"] / 2**20,
        "rss_peak_mib": block["rss_peak"] / 2**20,
        "loading_seconds": block["loading_seconds"],
    }


if __name__ == "__main__":
    main()
