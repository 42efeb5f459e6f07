"""What a run ends with, outside its budget: samples of its text, baselines on the same held-out text, the report, and
its model as a directory with a card.

The command line and the notebook API call this after `train` or `resume`; it stands above training, evaluation and
serving, and reads and writes the run directory only.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from cramjax.cache import write_atomically
from cramjax.card import model_card
from cramjax.data import prepare
from cramjax.errors import UserError
from cramjax.evaluation import baselines
from cramjax.language_model import save_model
from cramjax.serve import Filling, Generation, fill_mask, generate
from cramjax.training import Run
from cramjax.training.display import Display, QuietDisplay
from cramjax.training.lock import locked
from cramjax.training.metrics import RunLog
from cramjax.training.report import write_report

SAMPLE_TOKENS = 192
"""Tokens of each sample."""
SAMPLE_LINES = 16
"""Lines of the first sample shown; the report has all of them."""


def finish(run: Run, display: Display | None = None) -> Run:
    """Add samples and baselines to a run that has spent its budget, and write its report.

    Args:
        run: the run, as `train` or `resume` returned it.
        display: shows the samples and where the report is; default: nothing.

    Returns:
        The run, with `baselines` in its summary.

    Raises:
        RunError: another process has begun to train in the run directory.
    """
    with locked(run.path):
        return _finish(run, display or QuietDisplay())


def _finish(run: Run, display: Display) -> Run:
    try:
        made = samples(run)
    except UserError as error:  # a prompt that this vocabulary makes too long: the run is worth its report all the same
        made = []
        display.message(f"no samples: {error}")
    log = RunLog(run.path, last_step=run.summary["steps"])
    try:
        for sample in made:
            prompt, text = _sample_record(sample)
            display.record(log.write("sample", step=run.summary["steps"], prompt=prompt, text=text))
    finally:
        log.close()
    if made:
        display.message("\n".join(["a sample:", *str(made[0]).splitlines()[:SAMPLE_LINES], ""]))
    # Of examples, only some tokens are predicted, which no model of all text could be compared with.
    scores = {}
    if run.config.examples is None and run.config.labels is None:
        scores = baselines(prepare(run.config.data, run.config.tokenizer, progress=display.message))
    summary = {**run.summary, "baselines": scores}
    write_atomically(run.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    run = dataclasses.replace(run, summary=summary)
    model = _write_model(run, made)
    report = write_report(run.path)  # last: a run without it is finished again by --resume
    against = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    compared = f" (for comparison: {against})" if against else ""
    display.message(_reached(run) + compared)
    display.message(f"report: {report}")
    display.message(f"model: {model}")
    return run


def _write_model(run: Run, samples: Sequence[Generation | Filling]) -> Path:
    """The run's model directory, in the place of one of a smaller budget."""
    path, new = run.path / "model", run.path / "model.new"
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    save_model(run.language_model, new, card=model_card(run, samples))
    shutil.rmtree(path, ignore_errors=True)
    return new.replace(path)


def _reached(run: Run) -> str:
    """What a run came to, in one sentence."""
    summary = run.summary
    if run.config.labels is not None:
        reached = f"accuracy {summary['accuracy']:.1%}, " if "accuracy" in summary else ""
        unit = "nats per text" if reached else "mean squared error"
        return f"held-out labels: {reached}loss {summary['loss']:.3f} ({unit})"
    if run.config.objective.kind == "preference":
        return f"held-out preferences: accuracy {summary['accuracy']:.1%}, loss {summary['loss']:.3f} (nats per pair)"
    what = "text" if run.config.examples is None else "examples"
    return f"held-out {what}: {summary['bits_per_byte']:.3f} bits per byte"


def samples(run: Run) -> list[Generation] | list[Filling]:
    """Continue the configured prompts, or fill their masks."""
    prompts = run.config.evaluate.samples
    if run.config.objective.labelled:
        return []
    if run.config.objective.causal:
        return generate(run, prompts, max_tokens=SAMPLE_TOKENS, seed=run.config.seed)
    return [fill_mask(run, prompt) for prompt in prompts if prompt]


def _sample_record(sample: Generation | Filling) -> tuple[str, str]:
    if isinstance(sample, Generation):
        return sample.prompt, sample.text
    return sample.text, str(sample).removeprefix(sample.text)
