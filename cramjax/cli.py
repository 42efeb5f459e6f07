"""The command line: parse, call, print. A user's mistake is one sentence on standard error and exit code 2.

Everything that needs jax is imported inside the commands, so that `--help` and configuration errors are instant.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from cramjax.commands.advise import advise
from cramjax.commands.check import check
from cramjax.commands.compare import compare
from cramjax.commands.compress import compress
from cramjax.commands.exchange import export, import_
from cramjax.commands.fit import fit
from cramjax.commands.glue import glue
from cramjax.commands.plan import plan
from cramjax.commands.serve import serve
from cramjax.commands.sweep import sweep
from cramjax.commands.train import train
from cramjax.commands.tune import merge, tune
from cramjax.commands.use import embed, evaluate, fill_mask, generate
from cramjax.errors import ConfigError, RunInterruptedError, UserError

_SUMMARY = """usage: cramjax COMMAND …

Train the best language model a fixed budget can buy, on the hardware you have.

  cramjax train RECIPE [--budget=10min] [--out DIR] [--GROUP.FIELD=VALUE …]
  cramjax train --resume RUN
  cramjax tune MODEL RECIPE [--budget=10min] [--out DIR] [--GROUP.FIELD=VALUE …]
  cramjax merge RUN --out MODEL
  cramjax compress MODEL METHOD --data FILE --out MODEL2 [--text FILE] [--FIELD=VALUE …]
  cramjax generate RUN [PROMPT …]
  cramjax generate MODEL --prompts FILE --device_memory 2GiB --host_memory 4GiB --disk DIR
  cramjax fill-mask RUN TEXT
  cramjax embed RUN --texts FILE --out OUT.npy [--pooling mean] [--cut]
  cramjax evaluate RUN [--text FILE …] [--json OUT]
  cramjax evaluate RUN --tasks TASK … [--data TASK=FILE …] [--limit N] [--against RUN2] [--json OUT]
  cramjax evaluate RUN --labels [FILE …] [--fields NAME=FIELD …] [--json OUT]
  cramjax glue MODEL --data DIR --out DIR [--tasks TASK …] [--seeds 5] [--json OUT]
  cramjax serve MODEL [--port 8000] [--api_key KEY] [--engine.FIELD=VALUE …]
  cramjax import SOURCE --out MODEL [--dtype bfloat16]
  cramjax export RUN --out OUT [--format hf|gguf|peft]
  cramjax check [--quick] [--json OUT]
  cramjax plan RECIPE [--device rtx4090] [--budget=24h] [--GROUP.FIELD=VALUE …]
  cramjax plan MODEL --generate --device_memory 2GiB --host_memory 4GiB --disk DIR [--prompts FILE]
  cramjax sweep SWEEP [--out DIR] [--engine local|ray|slurm] [--jobs N] [--dry_run]
  cramjax compare A [B] [--with FIELD=VALUE …] [--budget=5min] [--seeds 5] [--out DIR] [--GROUP.FIELD=VALUE …]
  cramjax fit TABLE [--method METHOD] [--json OUT] [--plot OUT.png]
  cramjax advise --fit FIT --budget 24h [--device rtx4090] [--recipe RECIPE] [--out RECIPE.yaml]

RUN may be a run or a model directory. `cramjax COMMAND --help` explains each; `cramjax --version` prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `cramjax`; default: those of the process.

    Returns:
        The exit code: 0; 1 where `cramjax check` found a number wrong; 2 after a mistake of the user's; 128 + the
        signal's number after an interrupted run.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_SUMMARY, end="")
        elif words[0] == "--version":
            print(f"cramjax {version('cramjax')}")
        elif words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:]) or 0
        else:
            raise ConfigError(f"there is no command {words[0]!r}. Commands: {', '.join(_COMMANDS)}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a directory that cannot be written, a disk that is full
        print(f"error: {error}. Mend that, and run the same command (or cramjax train --resume RUN).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after training, which catches signals itself
        again = "; the same command goes on where it was" if words[:1] == ["compress"] else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    except RunInterruptedError as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal_number  # what a shell reports of a process that a signal ended
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": train,
    "tune": tune,
    "merge": merge,
    "compress": compress,
    "generate": generate,
    "fill-mask": fill_mask,
    "embed": embed,
    "evaluate": evaluate,
    "glue": glue,
    "serve": serve,
    "import": import_,
    "export": export,
    "check": check,
    "plan": plan,
    "sweep": sweep,
    "compare": compare,
    "fit": fit,
    "advise": advise,
}

if __name__ == "__main__":
    sys.exit(main())
