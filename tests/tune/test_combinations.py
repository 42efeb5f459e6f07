"""Every way to tune with every optimizer and saving of memory: it trains, or is refused by name and not compiled."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import DataConfig, ModelConfig, RunConfig
from cramjax.errors import ConfigError
from cramjax.training.methods import step_program
from cramjax.training.parts import Vocabulary, build_parts
from cramjax.training.step import Batch
from cramjax.tune.combinations import METHODS, OPTIMIZERS, SAVINGS, combination, refusal, table

CELLS = [(method, optimizer) for method in METHODS for optimizer in OPTIMIZERS]
FAST = [("lora", "adamw"), ("prefix", "muon")]


@pytest.mark.parametrize(
    ("method", "optimizer"), [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.slow) for cell in CELLS]
)
def test_every_cell_trains_or_is_refused_by_name(method: str, optimizer: str, tmp_path: Path) -> None:
    base = RunConfig(
        budget="10steps",
        start_from="MODEL",
        data=DataConfig(sequence_length=16),
        model=ModelConfig(layers=2, width=16, heads=2, mlp=32, bias=True),
    )
    base = replace(base, batch=replace(base.batch, size=4), train=replace(base.train, data_parallel=1))
    base = replace(base, optim=replace(base.optim, lr=1e-2), train=replace(base.train, compute_dtype="float32"))
    reasons = {saving: refusal(method, optimizer, saving) for saving in SAVINGS}
    for reason in filter(None, reasons.values()):  # it names the method, the optimizer or the saving, and what to do
        assert re.search(r"optim\.name|offload_optimizer|microbatch", reason) and re.search("leave|set|Set", reason)
    allowed = [saving for saving, reason in reasons.items() if reason is None]
    assert bool(allowed) == (optimizer != "adalomo" or method == "full")
    if not allowed:
        return
    config = combination(method, optimizer, *allowed, base=base)  # all of them at once: one program
    parts = build_parts(config, Vocabulary(64, 0, None), jax.devices()[:2])
    program = step_program(config, parts)
    state, step = program.create(), program.step.compile()
    before = jax.tree.map(np.asarray, state.frozen)
    rows = np.random.default_rng(0).integers(1, 64, program.batch.tokens.shape, np.int32)
    batch = Batch(jax.device_put(rows, program.batch.tokens.sharding), jnp.int32(len(rows)))  # pyright: ignore
    losses = []
    for number in range(6):
        state, metrics = step(state, batch, np.float32((number + 1) / 20))
        losses.append(float(metrics.loss))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert (before == ()) == (method == "full")
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(one, np.asarray(two))


def test_the_table_is_what_the_documentation_shows() -> None:
    shown = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert table() in shown, f"print it again with cramjax.tune.combinations.table():\n{table()}"


def test_what_is_refused_stays_refused_with_others() -> None:
    from cramjax.recipes import validate

    base = RunConfig(start_from="MODEL", model=ModelConfig(window=8))
    for kind in ("prompt", "prefix"):
        with pytest.raises(ConfigError, match=rf"adapter.kind is {kind}, but the model has blocks with a sliding win"):
            validate(combination(kind, "adamw", base=base))
