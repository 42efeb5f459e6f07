"""Generate with a model that does not fit memory: plan, put everything in its place, walk, and clean up."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cramjax.compiling import keep_programs
from cramjax.devices import return_freed_memory
from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel
from cramjax.language_model.directory import StoredModel, open_model
from cramjax.model_yaml import is_model_directory
from cramjax.offloading import OffloadConfig
from cramjax.serve.generate import Generation
from cramjax.serve.offload.caches import Activations, Caches
from cramjax.serve.offload.draws import drawing
from cramjax.serve.offload.place import rows_of
from cramjax.serve.offload.plan import OffloadPlan, Setting, make_plan, setting_of
from cramjax.serve.offload.store import Scratch, scratch
from cramjax.serve.offload.streams import Schedule, Streams, streams
from cramjax.serve.offload.walk import Choose, Walk
from cramjax.serve.offload.weights import Coming, Weights, read_weights
from cramjax.serve.prompts import encoded_prompts, never_drawn, text_after
from cramjax.serve.request import SamplingParameters
from cramjax.serve.sampling import Sampling

Tell = Callable[[str], object]
"""Is told how far something is, in a few words."""


@dataclass(frozen=True)
class Offloaded:
    """Texts, and what making them took."""

    generations: list[Generation]
    plan: OffloadPlan
    tokens: int
    """Drawn."""
    seconds: float
    """From the first prompt to the last token; without reading the weights once before, and compiling."""
    loading_seconds: float
    compiling_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Drawn tokens over the time."""
        return self.tokens / self.seconds

    def json(self) -> dict[str, Any]:
        """What `--json` writes."""
        measured = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "loading_seconds": self.loading_seconds,
            "compiling_seconds": self.compiling_seconds,
        }
        return {"plan": self.plan.json(), "measured": measured}


def open_stored(path: str | Path) -> StoredModel:
    """The model directory of a path, of which no weight is read yet.

    Raises:
        RunError: it is a run's, or none.
    """
    keep_programs()
    if not is_model_directory(path):
        if (Path(path).expanduser() / "config.yaml").is_file():
            inner = Path(path) / "model"
            raise RunError(
                f"{path} is a run, whose checkpoint is read whole: offloaded generation needs a model directory, which "
                + (f"{inner} is." if is_model_directory(inner) else "is beside its report once it has ended.")
            )
        raise RunError(f"{path} is not a model directory: give one that `cramjax import` made.")
    return open_model(path)


def plan_generation(
    path: str | Path, config: OffloadConfig, prompts: int | Sequence[int] | Sequence[str], max_tokens: int | None = None
) -> OffloadPlan:
    """How a model would generate within limits, and how fast.

    Args:
        path: a model directory.
        config: limits, and how weights and cache are held.
        prompts: texts; or tokens of each; or how many there will be, of 128 tokens or half of the context.
        max_tokens: drawn for each. Default: 128, or what the context has room for.

    Raises:
        UserError: the limits do not hold one block, a prompt is too long, or the model does not continue text.
    """
    stored = open_stored(path)
    context = stored.model.context
    if isinstance(prompts, int):
        prompts = [min(128, max(1, context // 2))] * prompts
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    lengths = [prompt for prompt in prompts if isinstance(prompt, int)]
    if texts:
        lengths = [len(row) for row in encoded_prompts(stored.model, texts, chat=False)[1]]
    max_tokens = min(128, max(1, context - max(lengths))) if max_tokens is None else max_tokens
    _check_lengths(stored.model, lengths, max_tokens)
    return make_plan(setting_of(stored, config), config, lengths, max_tokens)


def generate_offloaded(
    path: str | Path,
    prompts: Sequence[str],
    config: OffloadConfig,
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    tell: Tell | None = None,
) -> Offloaded:
    """Continue prompts with a model larger than memory. What is drawn is what `generate` draws.

    Args:
        path: a model directory.
        prompts: texts.
        config: limits, and how weights and cache are held.
        max_tokens: most tokens drawn for each prompt.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability only.
        seed: seed of the draws.
        chat: take each prompt for what a user says.
        tell: is told what was planned, and how far it is.

    Raises:
        UserError: the limits do not hold one block, a prompt is too long, or the disk is full.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more, got {max_tokens}.")
    if not prompts:
        raise ConfigError("prompts must be one text or more, got none.")
    sampling = Sampling(temperature, top_k, top_p)
    stored = open_stored(path)
    starts, rows = encoded_prompts(stored.model, prompts, chat=chat)
    lengths = [len(row) for row in rows]
    _check_lengths(stored.model, lengths, max_tokens)
    setting = setting_of(stored, config)
    plan = make_plan(setting, config, lengths, max_tokens)
    if tell is not None:
        tell(str(plan))
    with opened(setting, plan, tell=tell) as session:
        began = time.perf_counter()
        drawn = session.generate(rows, max_tokens, sampling, seed, tell=tell)
        compiling = session.walk.programs.compiling_seconds
        seconds = time.perf_counter() - began - compiling
    tokenizer = stored.model.tokenizer
    made = [_generation(tokenizer, *each) for each in zip(prompts, rows, starts, drawn, strict=True)]
    return Offloaded(made, plan, sum(map(len, drawn)), seconds, session.loading_seconds, compiling)


def _check_lengths(model: LanguageModel, lengths: list[int], max_tokens: int) -> None:
    longest = max(lengths)
    if longest + max_tokens > model.context:
        raise ConfigError(
            f"prompt {lengths.index(longest) + 1} has {longest} tokens, and with --max_tokens={max_tokens} that is "
            f"more than the model's context of {model.context}: shorten it, or draw at most "
            f"{max(0, model.context - longest)}."
        )


def _generation(tokenizer: Any, prompt: str, row: list[int], start: int, drawn: list[int]) -> Generation:
    ended = drawn[-1] in tokenizer.ends
    text = text_after(tokenizer, row[start:], drawn[:-1] if ended else drawn)
    return Generation(prompt, text, len(drawn), "separator" if ended else "length")


@dataclass(frozen=True)
class Session:
    """A model in its place."""

    setting: Setting
    plan: OffloadPlan
    walk: Walk
    loading_seconds: float

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        *,
        tell: Tell | None = None,
    ) -> list[list[int]]:
        """Draw tokens after each row; longer rows first, so that blocks hold rows alike.

        Args:
            rows: token ids, one at least each.
            max_tokens: most tokens drawn for each.
            sampling: how.
            seed: of the draws.
            tell: is told how far it is.
        """
        batch, vocabulary = self.plan.policy.batch, self.setting.model.vocab_size
        banned = never_drawn(self.setting.stored.model.tokenizer, vocabulary)
        # As `generate` has it: what a row draws depends on its number, and not on the rows beside it.
        way = partial(SamplingParameters, sampling.temperature, sampling.top_k or 0, sampling.top_p or 1.0)
        each = [way(seed=row << 32 | seed & 0xFFFFFFFF) for row in range(len(rows))]
        draws = drawing(batch, vocabulary, banned)

        def choose(order: np.ndarray) -> Choose:
            own = [draws([each[row] for row in order[at : at + batch]]) for at in range(0, len(order), batch)]
            return lambda number, step, logits: own[number](step, logits)

        return self.through(rows, max_tokens, choose, tell=tell)

    def through(
        self,
        rows: Sequence[Sequence[int]],
        max_tokens: int,
        choose: Callable[[np.ndarray], Choose],
        *,
        tell: Tell | None = None,
    ) -> list[list[int]]:
        """The same with another way to choose tokens, made for the rows of a block by their numbers."""
        order = np.argsort([-len(row) for row in rows], kind="stable")
        drawn: list[list[int]] = [[] for _ in rows]
        blocks = math.ceil(len(rows) / self.plan.policy.rows)
        ends = self.setting.stored.model.tokenizer.ends
        for number in range(blocks):
            if tell is not None:
                tell(f"block {number + 1} of {blocks}")
            own = order[number * self.plan.policy.rows : (number + 1) * self.plan.policy.rows]
            made = self.walk.run([rows[row] for row in own], max_tokens, choose(own), ends)
            for row, tokens in zip(own.tolist(), made, strict=True):
                drawn[row] = tokens
        return drawn


@contextlib.contextmanager
def opened(
    setting: Setting, plan: OffloadPlan, *, schedule: Schedule = "overlapped", tell: Tell | None = None
) -> Iterator[Session]:
    """Put a model in its place; at the end nothing of it is left on the disk.

    Args:
        setting: the model.
        plan: where everything is to lie.
        schedule: whether streams overlap.
        tell: is told how far it is.

    Raises:
        UserError: a file is damaged, or the disk is full.
    """
    with scratch(plan.limits.disk) as made, streams(schedule) as flow:
        return_freed_memory()
        began = time.perf_counter()
        weights = read_weights(setting.stored, setting.layout, plan.placement, made, device=setting.device, tell=tell)
        try:
            loading = time.perf_counter() - began
            return_freed_memory()
            yield Session(setting, plan, _walk(setting, plan, weights, made, flow, schedule), loading)
        finally:
            weights.files.close()


def _walk(
    setting: Setting, plan: OffloadPlan, weights: Weights, made: Scratch, flow: Streams, schedule: Schedule
) -> Walk:
    policy = plan.policy
    places = plan.prompt + plan.output
    programs = setting.programs(rows_of(policy, policy.cache))
    caches = Caches(
        programs,
        setting.cache_shape,
        blocks=len(setting.layout.blocks),
        batches=policy.batches,
        places=places,
        scratch=made,
        load=flow.cache_in,
        store=flow.cache_out,
        host=setting.host,
        attend_on_host=setting.attends_on_host,
    )
    model = setting.model
    activations = Activations(
        rows_of(policy, policy.hidden),
        policy.batches,
        (policy.batch, plan.prompt, model.config.width),
        model.compute_dtype,
        made,
        flow.hidden_in,
        flow.hidden_out,
        setting.device,
    )
    coming = Coming(weights, plan.placement.ring, flow.weights, setting.device, ahead=schedule == "overlapped")
    return Walk(setting.layout, weights, programs, coming, caches, activations, batch=policy.batch, places=places)


def one_batch_at_a_time(plan: OffloadPlan) -> OffloadPlan:
    """The same plan without blocks: each batch has a pass over the weights to itself."""
    return replace(plan, policy=replace(plan.policy, batches=1))
