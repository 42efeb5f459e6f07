"""`cramjax compress`: a model in fewer bits, or with weights set to 0."""

import argparse
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from cramjax import loading
from cramjax.commands.common import print_value, require_directories, write_json
from cramjax.compression import METHODS, CompressConfig, resolved
from cramjax.errors import ConfigError
from cramjax.recipes import compression_names, load_compression


def compress(words: Sequence[str]) -> None:
    """Compress a model, or go on with that."""
    hows = f"{', '.join(METHODS)}; by name {', '.join(compression_names())}; or the path of a YAML file"
    parser = ArgumentParser(
        prog="cramjax compress",
        usage="cramjax compress MODEL METHOD --data FILE --out MODEL2 [--text FILE] [--FIELD=VALUE …]",
        description="Make a model directory of a model (a run or a model directory) whose matrices have fewer bits, or "
        "weights set to 0. A block at a time is on the device. Given again after an interruption, the same command "
        "goes on from the last block that was done.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    given = argparse.SUPPRESS
    parser.add_argument("model", metavar="MODEL", nargs="?", default=given, help="A run or a model directory.")
    parser.add_argument("how", metavar="METHOD", nargs="?", default=given, help=f"One of {hows}.")
    parser.add_argument("--out", metavar="MODEL2", default=given, help="The model directory to make.")
    parser.add_argument("--json", metavar="FILE", default=given, help="Write the report there, too.")
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default=given,
        help="Of a run: the newest weights, or those with the lowest held-out bits per byte (default: latest).",
    )
    loading.add_options(parser, CompressConfig)
    options = loading.parse_arguments(parser, CompressConfig, words).as_dict()
    model, how, out, json = (options.pop(name, None) for name in ("model", "how", "out", "json"))
    checkpoint = options.pop("checkpoint", "latest")
    if model is None or how is None:
        raise ConfigError(
            f"cramjax compress needs a model and a method: cramjax compress MODEL METHOD. METHOD is {hows}."
        )
    if out is None:
        raise ConfigError("cramjax compress needs the model directory to make: --out MODEL2.")
    config = load_compression(how, options)
    resolved(config)
    require_directories({"--json": json})

    from rich.console import Console

    from cramjax.compress import compress_model, read_model
    from cramjax.formats.directory import require_new
    from cramjax.show.live import ProgressDisplay

    require_new(out)
    with ProgressDisplay(Console(stderr=True)) as tell:
        made = compress_model(read_model(model, checkpoint), config, out, tell=tell)
    print_value(made)
    if json is not None:
        write_json(json, made.json())


def plan_compressed(words: Sequence[str]) -> None:
    """Say what a compression will take."""
    parser = ArgumentParser(
        prog="cramjax plan",
        usage="cramjax plan MODEL --compress METHOD [--FIELD=VALUE …]",
        description="Say what time and memory a compression will take on the device there is, and how large what it "
        "makes will be; nothing is compressed, and no weight is read. The machine is timed for it. MODEL: a run, a "
        "model directory, a recipe's name, or a YAML file.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    given = argparse.SUPPRESS
    parser.add_argument("model", metavar="MODEL", nargs="?", default=given, help="What would be compressed.")
    parser.add_argument(
        "--compress", metavar="METHOD", nargs="?", default=given, help="As `cramjax compress` takes it."
    )
    parser.add_argument("--json", metavar="FILE", default=given, help="Write the plan there, too.")
    loading.add_options(parser, CompressConfig)
    options = loading.parse_arguments(parser, CompressConfig, words).as_dict()
    model, how, json = (options.pop(name, None) for name in ("model", "compress", "json"))
    if model is None or how is None:
        raise ConfigError("cramjax plan --compress needs a model and a method: cramjax plan MODEL --compress METHOD.")
    config = load_compression(how, options)
    require_directories({"--json": json})
    from cramjax.compress import plan_compression

    made = plan_compression(model, config)
    print_value(made)
    if json is not None:
        write_json(json, made.json())
