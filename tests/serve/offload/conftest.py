"""A small model directory, and plans for it that are made by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax.config import ModelConfig, TokenizerConfig
from cramjax.data.tokenizer import train_tokenizer
from cramjax.language_model import LanguageModel
from cramjax.model import make_model
from cramjax.offloading import OffloadConfig
from cramjax.serve.offload import place as placing
from cramjax.serve.offload import plan as planning
from cramjax.serve.offload.cost_model import Memory, Policy, Shares
from cramjax.serve.offload.plan import Limits, OffloadPlan, Setting, setting_of
from cramjax.serve.offload.run import open_stored
from cramjax.serve.offload.walk import width_of

TEXT = ["the stack walks block by block, and every token pays for its own place in the budget. " * 20]

THIRDS, HALF_ON_DISK = Shares(0.3, 0.3, 0.4), Shares(0.25, 0.25, 0.5)

SaveModel = Callable[..., Path]
MakePlan = Callable[..., tuple[Setting, OffloadPlan]]


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """Writes a model with random weights, of which a block's matrices are large enough to be moved."""
    words = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXT)

    def save(context: int = 64, **model: Any) -> Path:
        config = ModelConfig(**{"layers": 3, "width": 128, "heads": 4, "mlp": 256, "init_std": 0.2} | model)
        built = make_model(
            config,
            vocab_size=words.vocab_size,
            sequence_length=context,
            causal=True,
            separator_id=words.separator_id,
        )
        path = tmp_path_factory.mktemp("offloaded") / "model"
        LanguageModel(path, "causal", words, context, built, built.init(jax.random.key(0))).save(path)
        return path

    return save


@pytest.fixture(scope="session")
def model(save_model: SaveModel) -> Path:
    """One model for many tests."""
    return save_model()


@pytest.fixture
def by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is compiled and timed: XLA multiplies."""
    monkeypatch.setattr(planning, "speeds", dict)


@pytest.fixture
def plan_of(tmp_path: Path, by_xla: None) -> MakePlan:
    """Plans that nothing was timed for."""

    def make(
        path: Path,
        lengths: Sequence[int],
        output: int,
        *,
        batch: int = 4,
        batches: int = 2,
        weights: Shares = THIRDS,
        cache: Shares = HALF_ON_DISK,
        hidden: Shares = HALF_ON_DISK,
        weights_held: Any = "auto",
        cache_held: Any = "auto",
    ) -> tuple[Setting, OffloadPlan]:
        disk = tmp_path / "disk"
        disk.mkdir(exist_ok=True)
        setting = setting_of(open_stored(path), OffloadConfig(disk=str(disk), weights=weights_held, cache=cache_held))
        placement = placing.place(setting.layout, weights)
        plan = OffloadPlan(
            name="model",
            model_bytes=setting.layout.bytes,
            limits=Limits(1 << 30, 1 << 30, disk),
            prompts=len(lengths),
            prompt=width_of(max(lengths)),
            output=output,
            policy=placing.whole_rows(Policy(batch, batches, placement.shares, cache, hidden)),
            placement=placement,
            memory=Memory(0, 0, 0),
            seconds=0.0,
            tokens_per_second=0.0,
            considered=(),
            disk=None,  # pyright: ignore[reportArgumentType]
            machine=None,  # pyright: ignore[reportArgumentType]
            work=None,  # pyright: ignore[reportArgumentType]
        )
        return setting, plan

    return make
