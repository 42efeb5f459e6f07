"""`cramjax generate --device_memory …` and `cramjax plan --generate`: models larger than memory."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cramjax import loading
from cramjax.commands.common import print_value, require_directories, write_json
from cramjax.errors import ConfigError, DataError, RunError
from cramjax.offloading import OffloadConfig, parse_bytes

OPTIONS = ("--device_memory", "--host_memory", "--disk")
"""Those that say that a model is larger than memory."""


def is_offloaded(words: Sequence[str]) -> bool:
    """Whether the words of a command limit memory."""
    return any(word.split("=")[0] in OPTIONS for word in words)


def generate_offloaded(words: Sequence[str]) -> None:
    """Continue prompts with a model larger than memory."""
    parser = _parser(
        "generate",
        "MODEL [PROMPT …] [--prompts FILE] --device_memory 2GiB --host_memory 4GiB --disk DIR",
        "Continue prompts with a model that is larger than memory: weights, cache and activations are divided over "
        "device, host and disk, and many prompts share each pass over the weights.",
    )
    options: dict[str, dict[str, Any]] = {
        "--prompts": {"metavar": "FILE", "help": "Prompts: one a line, or JSON lines with a field `prompt`."},
        "--out": {"metavar": "FILE", "help": "Write texts to this file, as JSON lines. Default: print them."},
        "--max_tokens": {"type": int, "default": 128, "help": "Most tokens to add (default: 128)."},
        "--temperature": {"type": float, "default": 0.8, "help": "0: always the likeliest token (default: 0.8)."},
        "--top_k": {"type": int, "default": None, "help": "Draw from this many likeliest tokens only."},
        "--top_p": {"type": float, "default": None, "help": "Draw from the likeliest tokens of this mass only."},
        "--seed": {"type": int, "default": 0, "help": "Seed of the draws (default: 0)."},
        "--chat": {"action": "store_true", "help": "Prompts are what a user says, by the model's chat template."},
        "--json": {"metavar": "OUT", "help": "Also write the plan, and what it came to, to this file."},
    }
    given, config = _parsed(parser, options, words, prompts=True)
    model = _model(given, "cramjax generate")
    require_directories({"--json": given.get("json"), "--out": given.get("out")})
    _check(config)
    prompts = prompts_given(given.pop("texts", []), given.get("prompts"))
    if not prompts:
        raise ConfigError("offloaded generation needs prompts: give --prompts FILE, or texts after MODEL.")
    drawn = ("max_tokens", "temperature", "top_k", "top_p", "seed", "chat")
    from cramjax.serve.offload.run import generate_offloaded as run

    made = run(model, prompts, config, tell=_tell, **{name: given[name] for name in drawn if name in given})
    chat = given.get("chat", False)
    if (out := given.get("out")) is not None:
        lines = [json.dumps({"prompt": g.prompt, "text": g.text, "stopped": g.stopped}) for g in made.generations]
        _write(Path(out), "\n".join(lines) + "\n")
    else:
        print("\n\n".join(g.text if chat else str(g) for g in made.generations))
    _tell(
        f"{made.tokens:,} tokens in {made.seconds:.1f} s: {made.tokens_per_second:.3g} tokens/s, planned "
        f"{made.plan.tokens_per_second:.3g}. Before, weights were read in {made.loading_seconds:.1f} s and programs "
        f"compiled in {made.compiling_seconds:.1f} s."
    )
    if given.get("json") is not None:
        write_json(given["json"], made.json())


def plan_offloaded(words: Sequence[str]) -> None:
    """Say what offloaded generation will take."""
    parser = _parser(
        "plan",
        "MODEL --generate --device_memory 2GiB --host_memory 4GiB --disk DIR [--prompts FILE]",
        "Say how a model will generate within limits, what it takes of device, host and disk, and how fast it will be; "
        "nothing is generated. The machine is timed for it.",
    )
    options: dict[str, dict[str, Any]] = {
        "--generate": {"action": "store_true", "help": "Plan generation, not training."},
        "--prompts": {"metavar": "FILE", "help": "Prompts: one a line, or JSON lines with a field `prompt`."},
        "--count": {"type": int, "help": "Without --prompts: how many there will be (default: 64)."},
        "--prompt_tokens": {
            "type": int,
            "help": "Without --prompts: tokens of each (default: 128, or half of the model's context).",
        },
        "--max_tokens": {
            "type": int,
            "help": "Tokens to add to each (default: 128, or as many as the model's context has room for).",
        },
        "--json": {"metavar": "OUT", "help": "Also write the plan to this file."},
    }
    given, config = _parsed(parser, options, words)
    model = _model(given, "cramjax plan --generate")
    require_directories({"--json": given.get("json")})
    _check(config)
    for name in ("count", "prompt_tokens", "max_tokens"):
        if given.get(name, 1) < 1:
            raise ConfigError(f"--{name} must be 1 or more, got {given[name]}.")
    file = given.get("prompts")
    if file is not None and (wrong := [name for name in ("count", "prompt_tokens") if name in given]):
        raise ConfigError(f"--prompts says what --{wrong[0]} would: give one of them.")
    texts = None if file is None else prompts_given([], file)
    from cramjax.serve.offload.run import plan_generation

    count = given.get("count", 64)
    lengths = [given["prompt_tokens"]] * count if "prompt_tokens" in given else count
    made = plan_generation(model, config, lengths if texts is None else texts, given.get("max_tokens"))
    print_value(made)
    if given.get("json") is not None:
        write_json(given["json"], made.json())


def _parser(command: str, usage: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"cramjax {command}",
        usage=f"cramjax {command} {usage}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A model directory.")
    return parser


def _parsed(
    parser: ArgumentParser, options: dict[str, dict[str, Any]], words: Sequence[str], *, prompts: bool = False
) -> tuple[dict[str, Any], OffloadConfig]:
    """What is given of the command's own options, and the configuration."""
    if prompts:
        parser.add_argument("texts", metavar="PROMPT", nargs="*", default=[], help="Texts, instead of a file.")
    for flag, own in options.items():
        parser.add_argument(flag, **own)
    loading.add_options(parser, OffloadConfig)
    given = loading.parse_arguments(parser, OffloadConfig, words).as_dict()
    own = {name: value for name, value in given.items() if not hasattr(OffloadConfig, name) and value is not None}
    config = {name: value for name, value in given.items() if hasattr(OffloadConfig, name)}
    return own, loading.from_mapping(OffloadConfig, config)


def _model(given: dict[str, Any], command: str) -> str:
    if given.get("model") is None:
        raise ConfigError(f"{command} needs a model directory. See `{command.split(' --')[0]} --help`.")
    return str(given["model"])


def _check(config: OffloadConfig) -> None:
    """What cannot be, before jax starts."""
    if config.disk is None:
        raise ConfigError("--disk must be a directory for what memory does not hold, got none: give one, such as /tmp.")
    if not Path(config.disk).expanduser().is_dir():
        raise RunError(f"--disk {config.disk} is no directory: give one that exists.")
    if config.device_memory is not None:
        parse_bytes(config.device_memory, "--device_memory")
    parse_bytes(config.host_memory, "--host_memory")


def prompts_given(texts: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the command line, or of a file; there may be none.

    Raises:
        ConfigError: there are both.
        DataError: the file is missing, empty or damaged.
    """
    if file is None:
        return list(texts)
    if texts:
        raise ConfigError("--prompts FILE and texts after MODEL exclude each other: give one.")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"--prompts {file} cannot be read: {error.strerror}. Give a file with a prompt a line."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"--prompts {file} is not UTF-8 text: give a file with a prompt a line.") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError(f"--prompts {file} holds no prompt: write one a line.")
    if Path(file).suffix not in (".jsonl", ".json"):
        return found
    try:
        return [str(json.loads(line)["prompt"]) for line in found]
    except (ValueError, KeyError, TypeError):
        raise DataError(f'--prompts {file} must hold JSON lines such as {{"prompt": "Once"}}.') from None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    from cramjax.cache import write_atomically

    write_atomically(path, text)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
