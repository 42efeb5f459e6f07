"""The loop spends its budget once, resumes exactly, stops cleanly, and never goes on with a broken state."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax import devices
from cramjax.config import RunConfig
from cramjax.errors import ConfigError, DataError, RunError, RunInterruptedError
from cramjax.training import load_run, parts, resume, train
from cramjax.training.checkpoint import find_damage, list_checkpoints, read_meta
from cramjax.training.display import QuietDisplay
from cramjax.training.heldout import HeldOut
from cramjax.training.metrics import read_records
from cramjax.training.run import read_config
from cramjax.training.session import Session

Tiny = Callable[..., RunConfig]


def leaves(run: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(run.params)]


def assert_same_parameters(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


class StopAt(QuietDisplay):
    """Sends this process a signal when a record of the given step is shown."""

    def __init__(self, step: int, number: int = signal.SIGTERM, kind: str = "train"):
        super().__init__()
        self.step, self.number, self.kind, self.sent = step, number, kind, False

    def record(self, record: Any) -> None:
        if record["kind"] == self.kind and record["step"] >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


def test_a_run_learns_and_leaves_what_it_promises(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny(budget="60steps"), tmp_path / "run")
    records = read_records(tmp_path / "run")
    evaluations = [r for r in records if r["kind"] == "evaluate"]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"] < 8
    assert {"config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "checkpoints"} <= {
        p.name for p in run.path.iterdir()
    }
    assert any(p.name.startswith("events.out.tfevents") for p in run.path.iterdir())
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    assert summary["final_fraction"] == 1.0
    assert summary["steps"] == summary["budget_spent"] == 60
    assert summary["tokens"] == 60 * 8 * 32
    assert summary["final_lr"] == 0.0  # wsd ends at zero
    needed = (
        "bits_per_byte loss budget budget_spent final_fraction tokens steps flops tokens_per_second mfu train_seconds"
    )
    assert set(needed.split()) | {"prepare_seconds", "params"} <= set(summary)
    assert summary["params"] == sum(x.size for x in leaves(run))


@pytest.mark.parametrize(("budget", "unit"), [("6144tok", "tokens"), ("24steps", "steps")])
def test_token_and_step_budgets_are_spent_exactly(tiny: Tiny, tmp_path: Path, budget: str, unit: str) -> None:
    summary = train(tiny(budget=budget), tmp_path / "run").summary
    assert summary["steps"] == 24
    assert summary["budget_spent"] == {"tokens": 24 * 256, "steps": 24}[unit]
    assert summary["final_fraction"] == 1.0


def test_flop_budgets_end_within_half_a_step(tiny: Tiny, tmp_path: Path) -> None:
    summary = train(tiny(budget="2e9flop"), tmp_path / "run").summary
    per_step = summary["flops"] / summary["steps"]
    assert abs(summary["flops"] - 2e9) <= per_step / 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "crammed-bert"])
def test_stopped_and_resumed_equals_uninterrupted(tiny: Tiny, tmp_path: Path, recipe: str) -> None:
    config = tiny(recipe)
    whole = train(config, tmp_path / "whole")
    for step in (3, 11, 17):
        path = tmp_path / "parts"
        with pytest.raises(RunInterruptedError, match="--resume") as stopped:
            if path.exists():
                resume(path, display=StopAt(step))
            else:
                train(config, path, display=StopAt(step))
        assert stopped.value.signal_number == signal.SIGTERM
    parts = resume(path)
    assert_same_parameters(whole, parts)
    assert parts.summary["bits_per_byte"] == whole.summary["bits_per_byte"]
    steps = [r["step"] for r in read_records(path) if r["kind"] == "train"]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_row_due_at_the_first_step_after_a_resume_is_written(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(budget="24steps", train__log_points=4, evaluate__points=6)
    with pytest.raises(RunInterruptedError):  # it stops after one more step
        train(config, tmp_path / "run", display=StopAt(4, kind="evaluate"))
    resume(tmp_path / "run")
    assert [r["step"] for r in read_records(tmp_path / "run") if r["kind"] == "train"] == [7, 12, 18, 24]


_FUSED = {
    "optim__name": "adalomo",
    "optim__lr": 0.02,
    "optim__ema": 0.0,
    "batch__microbatch": 8,
    "batch__ramp": 0.0,
    "model__dropout": 0.1,
    "train__param_dtype": "bfloat16",
    "train__remat": "full",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "crammed-bert"])
def test_layers_updated_in_place_learn_in_bfloat16_and_resume_exactly(tiny: Tiny, tmp_path: Path, recipe: str) -> None:
    config = tiny(recipe, **_FUSED, budget="60steps")
    whole = train(config, tmp_path / "whole")
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {np.dtype("bfloat16")}
    scores = [r["bits_per_byte"] for r in read_records(tmp_path / "whole") if r["kind"] == "evaluate"]
    assert scores[-1] < scores[0] < 8
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "parts", display=StopAt(23))
    parts = resume(tmp_path / "parts")
    assert_same_parameters(whole, parts)
    assert parts.summary["bits_per_byte"] == whole.summary["bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_layers_updated_in_place_on_many_devices_give_the_curve_of_one(tiny: Tiny, tmp_path: Path, name: str) -> None:
    common = _FUSED | {"optim__name": name, "train__param_dtype": "float32", "budget": "12steps"}
    one = train(tiny(**common), tmp_path / "one")
    many = train(tiny(**common, train__data_parallel=2, train__fsdp=4), tmp_path / "many")
    curves = [[r["loss"] for r in read_records(run.path) if r["kind"] == "train"] for run in (one, many)]
    assert len(curves[0]) > 5
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-4)  # float32 reductions in another order


@pytest.mark.slow
def test_resume_passes_over_a_damaged_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    whole = train(config, tmp_path / "whole")
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(15))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "meta.json").write_text("{}", encoding="utf-8")
    messages: list[str] = []

    class Listen(QuietDisplay):
        def message(self, text: str) -> None:
            messages.append(text)

    again = resume(tmp_path / "run", display=Listen())
    assert any(newest.name in message and "damaged" in message for message in messages)
    assert_same_parameters(whole, again)


@pytest.mark.slow
def test_a_time_budget_is_spent_once_over_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(budget="2steps"), tmp_path / "warm")  # so that compiling does not eat the budget
    config = tiny(budget="8s", checkpoint__seconds=0.2)
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(5))
    stopped_at = read_meta(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).spent
    summary = resume(tmp_path / "run").summary
    assert summary["final_fraction"] == 1.0
    assert summary["final_lr"] == 0.0
    # The clock goes on from where it stopped: nothing is given back, and what was spent counts to the end.
    after = [r for r in read_records(tmp_path / "run") if r["kind"] == "train" and r["step"] > stopped_at["steps"]]
    assert after and after[0]["seconds"] > stopped_at["seconds"] > 0
    assert after[0]["fraction"] > stopped_at["seconds"] / 8


def test_a_batch_ramp_grows_and_compiles_once(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jax.config.update("jax_log_compiles", True)
    try:
        train(tiny(batch__size=32, batch__microbatch=8, batch__ramp=0.6, budget="16384tok"), tmp_path / "run")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(compiled) == 1
    sizes = [r["batch_size"] for r in read_records(tmp_path / "run") if r["kind"] == "train"]
    assert sizes == sorted(sizes) and sizes[0] < 32 and sizes[-1] == 32


def test_a_batch_ramp_from_128_to_8192_sequences_compiles_once(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"tokenizer__kind": "bytes", "data__sequence_length": 4, "model__layers": 1, "model__width": 16}
    ramp = {"batch__size": 8192, "batch__microbatch": 128, "batch__ramp": 0.6, "budget": "400000tok"}
    jax.config.update("jax_log_compiles", True)
    try:
        train(tiny(**small, **ramp, train__log_points=100), tmp_path / "run")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation of jit(step)" in r.getMessage()]
    assert len(compiled) == 1
    sizes = [r["batch_size"] for r in read_records(tmp_path / "run") if r["kind"] == "train"]
    assert sizes == sorted(sizes) and sizes[0] == 128 and sizes[-1] == 8192 and len(set(sizes)) > 5


def test_accumulated_gradients_give_the_step_of_the_whole_batch(tiny: Tiny, tmp_path: Path) -> None:
    whole = train(tiny(budget="6steps", optim__name="adamw", optim__lr=1e-3), tmp_path / "whole")
    cut = train(tiny(budget="6steps", optim__name="adamw", optim__lr=1e-3, batch__microbatch=2), tmp_path / "cut")
    for x, y in zip(leaves(whole), leaves(cut), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)  # float32 sums in another order, through Adam's division


@pytest.mark.parametrize(
    ("recipe", "data", "fsdp"),
    [("quickstart", 4, 1), ("quickstart", 2, 4), ("crammed-bert", 1, 4), ("crammed-bert", 4, 2)],
)
@pytest.mark.slow
def test_many_devices_give_the_curve_of_one(tiny: Tiny, tmp_path: Path, recipe: str, data: int, fsdp: int) -> None:
    common = {"budget": "12steps", "train__log_points": 12, "optim__name": "adamw", "optim__lr": 1e-3}
    common |= {"batch__size": 16, "batch__microbatch": 8}  # a microbatch that eight devices share
    one = train(tiny(recipe, **common), tmp_path / "one")
    many = train(tiny(recipe, **common, train__data_parallel=data, train__fsdp=fsdp), tmp_path / "many")
    curves = [[r["loss"] for r in read_records(run.path) if r["kind"] == "train"] for run in (one, many)]
    assert len(curves[0]) > 5
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-4)  # float32 reductions in another order
    assert many.summary["devices"] == data * fsdp


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(tiny: Tiny, tmp_path: Path) -> None:
    common = {"optim__name": "adamw", "optim__lr": 1e-3}
    one = train(tiny(**common), tmp_path / "one")
    path = tmp_path / "many"
    with pytest.raises(RunInterruptedError):
        train(tiny(**common, train__fsdp=4, train__zero=3), path, display=StopAt(6))
    for fsdp, zero, step in ((8, 2, 12), (2, 1, 18)):
        file = path / "config.yaml"
        text = re.sub(r"(\n  fsdp: )\d", rf"\g<1>{fsdp}", file.read_text(encoding="utf-8"))
        file.write_text(re.sub(r"(\n  zero: )\d", rf"\g<1>{zero}", text), encoding="utf-8")
        with pytest.raises(RunInterruptedError):
            resume(path, display=StopAt(step))
    many = resume(path)
    assert many.config.train.fsdp == 2 and many.summary["steps"] == one.summary["steps"]
    for x, y in zip(leaves(one), leaves(many), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5)  # float32 sums in another order, through Adam's division


@pytest.mark.slow
def test_many_devices_give_the_curve_of_one_in_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    common = {"budget": "12steps", "train__log_points": 12, "batch__size": 8, "train__compute_dtype": "bfloat16"}
    one = train(tiny(**common), tmp_path / "one")
    many = train(tiny(**common, train__data_parallel=2, train__fsdp=2), tmp_path / "many")
    curves = [[r["loss"] for r in read_records(run.path) if r["kind"] == "train"] for run in (one, many)]
    # Sums in another order may round an activation the other way, by 2^-8 of itself; losses average over thousands.
    np.testing.assert_allclose(curves[0], curves[1], rtol=5e-3)


def test_nothing_compiles_once_a_run_has_stepped_and_evaluated(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event))
    counts: list[int] = []
    evaluate = Session.evaluate

    def counted(session: Session, fraction: float, max_tokens: int | None) -> Any:
        result = evaluate(session, fraction, max_tokens)
        counts.append(compiled.count("/jax/core/compile/backend_compile_duration"))
        return result

    monkeypatch.setattr(Session, "evaluate", counted)
    # A batch that grows from one microbatch to four, and four evaluations while it does.
    ramp = {"batch__size": 16, "batch__microbatch": 4, "batch__ramp": 0.9, "evaluate__points": 5}
    train(tiny(**ramp), tmp_path / "run")
    assert counts[0] > 0
    assert counts[:4] == counts[:1] * 4


@pytest.fixture
def broken_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss not a number at half the budget."""
    build = parts.objective_for

    def poisoned(*arguments: Any, **keywords: Any) -> Any:
        loss_function = build(*arguments, **keywords)

        def loss(params: Any, tokens: Any, key: Any, fraction: Any, training: bool) -> Any:
            result = loss_function(params, tokens, key, fraction, training)
            factor = jax.numpy.where((fraction > 0.49) & (fraction < 0.51) & training, jax.numpy.nan, 1.0)
            return result._replace(total=result.total * factor, nll=result.nll * factor)

        return loss

    monkeypatch.setattr(parts, "objective_for", poisoned)


@pytest.mark.usefixtures("broken_middle")
def test_a_loss_that_is_not_finite_stops_the_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"stopped being finite at step 12: loss nan.*step_00000006"):
        train(tiny(), tmp_path / "run")
    assert find_damage(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) is None


@pytest.mark.usefixtures("broken_middle")
def test_rollback_skips_the_batches_since_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny(train__nonfinite="rollback"), tmp_path / "run")
    events = [r for r in read_records(run.path) if r.get("name") == "rollback"]
    assert len(events) == 1 and "step_00000006" in events[0]["message"]
    assert run.summary["final_fraction"] == 1.0
    assert all(np.isfinite(x).all() for x in leaves(run))


def test_existing_directories_are_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="exists already"):
        train(tiny(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resuming_a_finished_run_says_so_and_a_larger_budget_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    with pytest.raises(RunError, match="has spent its budget of 24 steps"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", budget="30steps").summary["steps"] == 30


def test_what_is_not_a_run_directory_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match=r"not a run directory"):
            resume(path)
        with pytest.raises(RunError, match=r"not a run directory"):
            load_run(path)


def test_budgets_too_small_for_a_step_are_refused_before_anything_is_written(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small for one step, which takes 256 tokens"):
        train(tiny(budget="100tok"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_sequences_than_a_batch_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(tiny(batch__size=1_000_000), tmp_path / "run")


def test_a_changed_corpus_is_noticed_on_resume(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    own = tmp_path / "corpus"
    own.mkdir()
    for file in corpus.glob("*.txt"):
        (own / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(RunInterruptedError):
        train(tiny(data__source=str(own / "*.txt")), tmp_path / "run", display=StopAt(5))
    for file in own.glob("*.txt"):
        file.write_text("quite another text " * 200 + file.name, encoding="utf-8")
    with pytest.raises(RunError, match="another vocabulary"):
        resume(tmp_path / "run")


def test_a_checkpoint_of_another_configuration_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    with pytest.raises(RunInterruptedError):
        train(config, tmp_path / "run", display=StopAt(5))
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("mlp: 64", "mlp: 128"), encoding="utf-8")
    with pytest.raises(RunError, match="another configuration"):
        resume(tmp_path / "run")


def test_runs_work_off_the_main_thread(tiny: Tiny, tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(budget="4steps"), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].summary["steps"] == 4


def test_the_exponential_average_is_what_evaluation_and_loading_use(tiny: Tiny, tmp_path: Path) -> None:
    plain = train(tiny(), tmp_path / "plain")
    averaged = train(tiny(optim__ema=0.9), tmp_path / "averaged")
    assert any((x != y).any() for x, y in zip(leaves(plain), leaves(averaged), strict=True))


def test_dataclass_fields_survive_the_run_directory(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(budget="4steps", optim__embed_lr=0.3, model__window=7)
    assert dataclasses.asdict(train(config, tmp_path / "run").config) == dataclasses.asdict(config)


def test_the_precision_that_a_run_chose_is_kept(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = tiny(train__compute_dtype="auto"), tmp_path / "run"
    monkeypatch.setattr(devices, "fast_bfloat16", lambda: True)
    with pytest.raises(RunInterruptedError):
        train(config, path, display=StopAt(5))
    assert read_config(path).train.compute_dtype == "bfloat16"
    monkeypatch.setattr(devices, "fast_bfloat16", lambda: False)  # another machine
    with pytest.raises(RunInterruptedError):
        resume(path, display=StopAt(10))
    # A run directory from before: what it chose is not written, neither in it nor in its checkpoints.
    for file in (path / "config.yaml", *path.glob("checkpoints/*/meta.json")):
        file.write_text(file.read_text("utf-8").replace("compute_dtype: bfloat16", "compute_dtype: auto"), "utf-8")
    for meta in path.glob("checkpoints/*/meta.json"):
        sums = meta.with_name("checksums.json")
        digest = hashlib.sha256(meta.read_bytes()).hexdigest()
        sums.write_text(json.dumps(json.loads(sums.read_text("utf-8")) | {"meta.json": digest}), "utf-8")
    assert resume(path).model.compute_dtype == "float32"
    assert read_config(path).train.compute_dtype == "float32"


@pytest.mark.slow
@pytest.mark.parametrize(("points", "at", "saved"), [(4, 1, 6), (3, 1, 8), (3, 3, 24), (3, 4, 24)])
def test_an_evaluation_that_fails_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int, at: int, saved: int
) -> None:
    """Where a checkpoint is due too, where none is, of the last checkpoint, and of all held-out text."""
    config, path, calls = tiny(evaluate__points=points), tmp_path / "run", []
    evaluate = HeldOut.evaluate

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at:
            raise ValueError("no score")
        return evaluate(*arguments)

    monkeypatch.setattr(HeldOut, "evaluate", failing)
    with pytest.raises(ValueError, match="no score"):
        train(config, path)
    newest = list_checkpoints(path / "checkpoints")[-1]
    assert find_damage(newest) is None and read_meta(newest).step == saved
    run = resume(path)
    assert run.summary["steps"] == 24
    assert read_meta(list_checkpoints(path / "checkpoints")[-1]).bits_per_byte is not None


def test_a_signal_is_answered_by_a_checkpoint_and_no_evaluation(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, path = StopAt(7), tmp_path / "run"
    evaluate = HeldOut.evaluate
    # Every step is evaluated, but those after the signal.
    monkeypatch.setattr(HeldOut, "evaluate", lambda *a: pytest.fail("too late") if stop.sent else evaluate(*a))
    with pytest.raises(RunInterruptedError):
        train(tiny(evaluate__points=24, train__log_points=24), path, display=stop)
    assert read_meta(list_checkpoints(path / "checkpoints")[-1]).step in (7, 8)


def test_scores_that_follow_their_checkpoints_say_which_is_best(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny(evaluate__points=4, checkpoint__keep=9), tmp_path / "run")
    paths = list_checkpoints(run.path / "checkpoints")
    metas = [read_meta(path) for path in paths]
    logged = {r["step"]: r["bits_per_byte"] for r in read_records(run.path) if r["kind"] == "evaluate"}
    assert [find_damage(path) for path in paths] == [None] * 4
    assert {m.step: m.bits_per_byte for m in metas[:-1]} == {step: logged[step] for step in (6, 12, 18)}
    assert (metas[-1].bits_per_byte or 99) < (metas[-2].bits_per_byte or 0)  # of a part of what is logged at the end
    (paths[1] / "score.json").write_text('{"bits_per_byte": 0.1}', encoding="utf-8")
    assert find_damage(paths[1]) == "score.json does not match its checksum"
