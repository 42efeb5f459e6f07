"""Many requests at once, over one model: admit, read prompts, draw tokens, give pages back.

The engine is not for several threads: one calls `add`, `cancel` and `step`. What it computes is in `programs`, what it
decides in `schedule`, who has which page in `pages`.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from cramjax.compiling import keep_programs
from cramjax.errors import ConfigError, RunError
from cramjax.language_model import LanguageModel
from cramjax.serve.engine.batch import Listener, Shapes, Task, make_rows, make_shapes
from cramjax.serve.engine.compiled import Programs, compilations, program
from cramjax.serve.engine.draft import check_draft
from cramjax.serve.engine.draw import needs_history
from cramjax.serve.engine.lookup import Lookup, changes
from cramjax.serve.engine.pages import PagePool, page_keys
from cramjax.serve.engine.programs import (
    MOST_STEPS,
    Drawn,
    Logprobs,
    Rows,
    begin,
    default_tokens,
    follow,
    hold_prompt,
    make_pool,
    prefill,
    speculate,
    step,
    verify,
)
from cramjax.serve.engine.schedule import pages_for, pages_missing, plan_pieces, plan_steps
from cramjax.serve.engine.start import BIASES, arguments, check, check_request, checked_tokens
from cramjax.serve.prompts import never_drawn
from cramjax.serve.request import Progress, Reason, Request, SamplingParameters, TokenLogprob
from cramjax.serving import EngineConfig

_log = logging.getLogger(__name__)

_CONTEXT = 4096
"""Tokens of a request, where nothing is said and the model sees more."""
_FEW = 4
"""Tokens that each draws in a call while others wait for their prompts to be read, and in the first one."""
_SECONDS = 0.05
"""That a call draws tokens for, about: who reads along, and who comes anew, waits no longer."""


@dataclass(frozen=True)
class Load:
    """What the engine holds now, and has done so far."""

    running: int
    waiting: int
    pages: int
    pages_used: int
    prefix_queries: int
    """Pages of prompts that were looked for."""
    prefix_hits: int
    """Those that were there."""
    preemptions: int
    """Requests that gave their pages up, to be computed again."""
    drawn_tokens: int
    guessed_tokens: int
    """Tokens guessed, from how texts went on before or by a draft model."""
    right_guesses: int
    """Those that the model drew too."""
    compilations: int
    """Programs compiled since the start: a fault, if any."""


class Engine:
    """Continues the prompts of many requests together."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig | None = None,
        shapes: Shapes | None = None,
        draft: LanguageModel | None = None,
    ):
        """Make room; nothing is compiled yet: each program is when it is first needed, or all are by `prepare`.

        Args:
            model: a causal one.
            config: what it may take.
            shapes: of calls. Default: those that suit many requests that come and go.
            draft: the model that `config.draft` names.

        Raises:
            RunError: the model is not causal.
            ConfigError: limits that contradict each other, or a draft model that cannot guess for this one.
        """
        if model.kind != "causal":
            raise RunError(f"{model.path} is a {model.kind} model, which does not continue text.")
        config = config or EngineConfig()
        if config.guesses and config.deterministic:
            raise ConfigError(
                f"{'draft must be null' if config.draft else 'lookup must be 0'} with deterministic=true: calls that "
                "verify guesses have another shape."
            )
        keep_programs()
        stack = model.model
        self.config = config
        self.context = _context(model, config)
        self.vocab_size = stack.vocab_size
        if draft is not None:
            check_draft(model, draft, config, self.context)
        self._draft = draft
        self._shapes = shapes or make_shapes(config, model, self.context, draft)
        size, bits, guesses = self._shapes.page, config.cache_bits, self._shapes.guesses
        held = config.cache_tokens or default_tokens(
            stack, self.context, config.slots, size, bits=bits, guesses=guesses
        )
        if held < self.context:
            raise ConfigError(f"cache_tokens must hold one context ({self.context} tokens), got {held}.")
        self.pool = PagePool(pages_for(held, size) + self._shapes.before + 1, size)
        self._language_model = model
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._slots = list(range(config.slots))[::-1]
        self._numbers = itertools.count()
        self._preemptions = self._drawn_tokens = self._guessed = self._right = 0
        self._seconds_each = _SECONDS / _FEW
        self._lookup = Lookup(config.lookup)
        self._reuse = config.prefix_cache and not config.deterministic
        banned = never_drawn(model.tokenizer, self.vocab_size)
        self._programs = Programs(
            {
                "prefill": program(prefill, stack, banned, False),
                "score": program(prefill, stack, banned, True),
                "step": program(step, stack, banned),
                "verify": program(verify, stack, banned),
                "begin": program(begin),
                "prompt": program(hold_prompt, stack),
            }
            | (
                {}
                if draft is None
                else {
                    "follow": program(follow, draft.model),
                    "speculate": program(speculate, stack, draft.model, banned),
                }
            )
        )
        drafting = None if draft is None else draft.model
        self._device = make_pool(stack, self.pool.pages, size, config.slots, drafting, bits=bits, guesses=guesses)
        self._before = self.pool.take(self._shapes.before) or []
        """Pages that every text begins with."""
        if self._before:
            self._device = self._programs["prompt",](model.params, self._device, np.array([self._before], np.int32))
        self._compilations: int | None = None
        """Of this process, when all programs were compiled."""
        self._known_late = 0

    def prepare(self) -> "Engine":
        """Compile all programs, and check that decoding token by token gives what the whole forward pass gives.

        Raises:
            RunError: the model is computed wrong here.
        """
        drafts = None if self._draft is None else self._draft.params
        self._programs.compile(arguments(self._language_model.params, drafts, self._device, self._shapes, self.context))
        if (length := checked_tokens(self.context, self._shapes, coded=self.config.cache_bits is not None)) >= 3:
            prompt = tuple(int(token) for token in np.linspace(0, self.vocab_size - 1, length - 2))
            got: list[Progress] = []
            self.add(Request(prompt, 2, SamplingParameters(temperature=0.0), top_logprobs=0), got.append)
            while self.step():
                pass
            check(self._language_model, prompt, got)
        self._preemptions = self._drawn_tokens = self._guessed = self._right = 0
        self.expect_no_more()
        return self

    def expect_no_more(self) -> None:
        """Take each program that this process compiles from now on for a fault."""
        self._compilations, self._known_late = compilations(), 0

    def add(self, request: Request, listener: Listener) -> int:
        """Let a request wait for its turn; `step` will tell the listener how it goes.

        Returns:
            Its number, for `cancel`.

        Raises:
            ConfigError: no tokens, tokens that are none, or more than the context.
        """
        check_request(request, self.context, self.vocab_size)
        task = Task(next(self._numbers), request, listener, list(request.prompt))
        self._waiting.append(task)
        return task.number

    def cancel(self, number: int) -> None:
        """End a request, wherever it is; one that has ended is left alone."""
        for task in [*self._running, *self._waiting]:
            if task.number == number:
                self._end(task, "cancelled")

    def step(self) -> bool:
        """One round: admit, read pieces of prompts, draw tokens. Listeners are called before it returns.

        Returns:
            Whether there was anything to do.
        """
        self._admit()
        drawing = [task for task in self._running if task.draws]
        reading = [task for task in self._running if not task.draws]
        if drawing:
            self._draw(drawing, few=bool(reading))
        reading = [task for task in reading if task in self._running]
        if reading:
            self._read(reading)
        if self._compilations is not None and self._late_compilations > self._known_late:
            self._known_late = self._late_compilations
            _log.warning("A program was compiled while requests waited, which is a fault: please report it.")
        return bool(drawing or reading)

    def load(self) -> Load:
        """What it holds and has done."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            pages=self.pool.pages - 1 - len(self._before),
            pages_used=self.pool.pages - 1 - len(self._before) - self.pool.free,
            prefix_queries=self.pool.queried,
            prefix_hits=self.pool.found,
            preemptions=self._preemptions,
            drawn_tokens=self._drawn_tokens,
            guessed_tokens=self._guessed,
            right_guesses=self._right,
            compilations=self._late_compilations,
        )

    @property
    def _late_compilations(self) -> int:
        return 0 if self._compilations is None else compilations() - self._compilations

    # Who comes in and who goes out.

    def _admit(self) -> None:
        while self._waiting and self._slots:
            task = self._waiting[0]
            size = self.pool.size
            if self._reuse and not task.scores and not task.keys:
                # At least one token is computed: the last one's logits are needed.
                task.keys = page_keys(task.tokens[:-1], size, task.salt)
            pages = self.pool.begin(task.keys, pages_for(len(task.tokens), size))
            if pages is None:
                return
            self._waiting.popleft()
            found, new = pages
            task.pages, task.keys, task.slot = [*found, *new], task.keys[: len(found)], self._slots.pop()
            task.computed = task.followed = len(found) * size
            if task.cached is None:
                task.cached = task.computed
            self._running.append(task)
            if needs_history(task.request.sampling):
                self._begin_history(task)

    def _leave(self, task: Task) -> None:
        self.pool.release(task.pages)
        self._slots.append(task.slot)
        self._running.remove(task)
        task.pages, task.keys, task.computed, task.followed, task.slot = [], [], 0, 0, -1

    def _end(self, task: Task, reason: Reason, progress: Progress | None = None) -> None:
        if task in self._waiting:
            self._waiting.remove(task)
        else:
            self._leave(task)
        task.listener(replace(progress or Progress(), cached=task.cached or 0, reason=reason))

    def _preempt(self, task: Task) -> None:
        self._preemptions += 1
        self._leave(task)
        self._waiting.appendleft(task)

    def _know(self, task: Task) -> None:
        """Let others find its full pages; with a draft model, those that it has filled too."""
        if self._reuse:
            held = task.computed if self._draft is None else min(task.computed, task.followed)
            full = held // self.pool.size
            if full > len(task.keys):
                keys = page_keys(task.tokens[: full * self.pool.size], self.pool.size, task.salt)
                for page, key in list(zip(task.pages, keys, strict=False))[len(task.keys) : full]:
                    self.pool.know(page, key)
                task.keys = keys

    # What is computed.

    def _draw(self, tasks: list[Task], few: bool) -> None:
        few_rows = len(tasks) <= max(self._shapes.verify, default=0)
        drafting = few_rows and self._draft is not None and not all(map(changes, tasks))
        guesses = self._guesses(tasks) if few_rows else {}
        speculating = drafting or bool(guesses)
        most = 1 + self._shapes.guesses if speculating else self._pace(few or bool(self._shapes.guesses))
        if not speculating and any(task.request.constraint is not None for task in tasks):
            most = 1  # what may come next is known when it is known what came
        steps, chosen = self._make_room(tasks, most)
        if not chosen:
            return
        if drafting:
            own = [0 if changes(task) else min(steps, task.room) - 1 for task in chosen]
            self._verify(chosen, [[0] * count for count in own])
            return
        if guesses:
            self._verify(chosen, [guesses.get(task.number, [])[: steps - 1] for task in chosen])
            return
        batch = next(size for size in self._shapes.step if size >= len(chosen))
        rows = self._batch(chosen, [[task.tokens[-1]] for task in chosen], (batch, 1))
        began = time.perf_counter()
        self._device, drawn = self._programs["step", batch, rows.table.shape[1]](
            self._language_model.params, self._device, rows, np.int32(steps)
        )
        drawn = jax.device_get(drawn)
        self._seconds_each = (time.perf_counter() - began) / max(int(drawn.counts.max()), 1)
        self._hand_out(chosen, drawn, held=1)

    def _make_room(self, tasks: list[Task], most: int) -> tuple[int, list[Task]]:
        """Give pages to those that draw, and take the newest requests' where there are too few.

        Returns:
            Tokens for which there is room, and who draws them.
        """
        while True:
            drawing, others = [task.held() for task in tasks], [t.held() for t in self._running if t not in tasks]
            plan = plan_steps(drawing, others, self.pool.free, self.pool.size, most)
            if plan.preempted is None:
                break
            self._preempt(next(task for task in self._running if task.number == plan.preempted))
            tasks = [task for task in tasks if task.number != plan.preempted]
        for task in tasks:
            taken = self.pool.take(pages_missing(task.held(), plan.steps, self.pool.size))
            if taken is None:
                raise RuntimeError(f"request {task.number} has {len(task.pages)} pages, and none are left for it.")
            task.pages += taken
        return plan.steps, tasks

    def _pace(self, few: bool) -> int:
        """Tokens that each may draw in the next call."""
        return max(1, min(_FEW if few else MOST_STEPS, int(_SECONDS / self._seconds_each)))

    def _guesses(self, tasks: list[Task]) -> dict[int, list[int]]:
        """Guesses by the numbers of the requests that have any."""
        return {task.number: guesses for task in tasks if (guesses := self._lookup.ask(task))}

    def _verify(self, tasks: list[Task], guesses: list[list[int]]) -> None:
        """Draw as far as guesses are right; those of a draft model are yet to be made."""
        params, kind = self._language_model.params, "verify"
        if self._draft is not None:
            self._follow(tasks, self._draft)
            params, kind = (params, self._draft.params), "speculate"
        batch, long = next(size for size in self._shapes.verify if size >= len(tasks)), 1 + self._shapes.guesses
        read = [[task.tokens[-1], *own] for task, own in zip(tasks, guesses, strict=True)]
        rows = self._batch(tasks, read, (batch, long))
        self._device, drawn = self._programs[kind, batch, rows.table.shape[1]](params, self._device, rows)
        drawn = jax.device_get(drawn)
        for task, own, count in zip(tasks, guesses, drawn.counts.tolist(), strict=False):
            self._lookup.tell(task, len(own), count)
            task.followed += count
            task.guessed += len(own)
            task.right += max(count - 1, 0)
            self._guessed += len(own)
            self._right += max(count - 1, 0)
        self._hand_out(tasks, drawn, held=1)

    def _follow(self, tasks: list[Task], draft: LanguageModel) -> None:
        """Let a draft model read what it has not."""
        while behind := [task for task in tasks if task.followed < task.computed]:
            held = [replace(task.held(), length=task.computed, computed=task.followed) for task in behind]
            (batch, long), pieces = plan_pieces(held, self._shapes.prefill)
            counts, behind = [count for _, count in pieces], behind[: len(pieces)]
            read = [task.tokens[task.followed : task.followed + n] for task, n in zip(behind, counts, strict=True)]
            rows = self._batch(behind, read, (batch, long), [task.followed for task in behind])
            self._device = self._programs["follow", batch, long, rows.table.shape[1]](draft.params, self._device, rows)
            for task, count in zip(behind, counts, strict=True):
                task.followed += count

    def _read(self, tasks: list[Task]) -> None:
        first = tasks[0]
        if first.scores:
            tasks, shapes, kind = [first], [(1, self._shapes.scored)], "score"
        else:
            tasks, shapes, kind = [task for task in tasks if not task.scores], self._shapes.prefill, "prefill"
        by_number = {task.number: task for task in tasks}
        (batch, long), pieces = plan_pieces([task.held() for task in tasks], shapes)
        chosen = [by_number[number] for number, _ in pieces]
        counts = [count for _, count in pieces]
        read = [task.tokens[task.computed : task.computed + n] for task, n in zip(chosen, counts, strict=True)]
        rows = self._batch(chosen, read, (batch, long))
        targets = None
        if kind == "score":
            targets = np.zeros((1, long), np.int32)
            after = first.tokens[first.computed + 1 : first.computed + counts[0] + 1]
            targets[0, : len(after)] = after
        self._device, drawn = self._programs[kind, batch, long, rows.table.shape[1]](
            self._language_model.params, self._device, rows, targets
        )
        drawn = jax.device_get(drawn)
        if kind == "score":
            self._score(first, drawn.scored, counts[0])
        for task, count in zip(chosen, counts, strict=True):
            task.computed += count
            self._know(task)
        self._hand_out(chosen, drawn, held=0)

    def _score(self, task: Task, scored: Logprobs, count: int) -> None:
        """Keep the log-probabilities of the prompt's tokens after those that were just read."""
        prompt, top = task.request.prompt, task.request.top_logprobs or 0
        if not task.computed:
            task.scored = [TokenLogprob(prompt[0], None)]
        for place in range(min(count, len(prompt) - task.computed - 1)):
            task.scored.append(_logprob(prompt[task.computed + place + 1], scored, (0, place), top))

    def _hand_out(self, tasks: Sequence[Task], drawn: Drawn, held: int) -> None:
        """Give what was drawn to those who wait for it. `held`: whether the first newest token is held by now."""
        for row, task in enumerate(tasks):
            if task not in self._running:  # cancelled by another's listener
                continue
            tokens, ended = task.take(drawn.tokens[row, : int(drawn.counts[row])].tolist())
            task.tokens += tokens
            task.computed += len(tokens) * held
            self._drawn_tokens += len(tokens)
            self._know(task)
            finished = task.computed >= len(task.request.prompt)
            reason: Reason | None = ended or ("length" if finished and task.room <= 0 else None)
            if not tokens and reason is None:
                continue
            top = task.request.top_logprobs
            logprobs = (
                ()
                if top is None
                else tuple(_logprob(token, drawn.logprobs, (row, place), top) for place, token in enumerate(tokens))
            )
            scored, task.scored = tuple(task.scored), []
            task.is_scored = True
            why = task.stuck_with if reason == "stuck" else ""
            progress = Progress(tuple(tokens), logprobs, scored, task.cached or 0, task.guessed, task.right, why=why)
            task.guessed = task.right = 0
            if why:
                _log.warning("A text ended after %d tokens: %s.", task.drawn, why)
            if reason is None:
                task.listener(progress)
            else:
                self._end(task, reason, progress)

    def _batch(
        self,
        tasks: Sequence[Task],
        read: Sequence[Sequence[int]],
        shape: tuple[int, int],
        starts: Sequence[int] | None = None,
    ) -> Rows:
        starts = [task.computed for task in tasks] if starts is None else starts
        return make_rows(self._language_model.model, self._shapes, self._before, tasks, read, shape, starts)

    def _begin_history(self, task: Task) -> None:
        prompt, drawn = (
            np.full(self.context, self.vocab_size, np.int32),
            np.full(self.context, self.vocab_size, np.int32),
        )
        own = len(task.request.prompt)
        prompt[:own], drawn[: task.drawn] = task.tokens[:own], task.tokens[own:]
        biased, bias = np.full(BIASES, self.vocab_size, np.int32), np.zeros(BIASES, np.float32)
        for place, (token, value) in enumerate(task.request.sampling.logit_bias):
            biased[place], bias[place] = token, value
        self._device = self._programs["begin",](None, self._device, np.int32(task.slot), prompt, drawn, biased, bias)


def _logprob(token: int, given: Logprobs, place: tuple[int, int], top: int) -> TokenLogprob:
    likeliest = zip(given.top_tokens[place][:top], given.top[place][:top], strict=True)
    return TokenLogprob(
        token, float(given.of_token[place]), tuple((int(t), float(p)) for t, p in likeliest if p > -np.inf)
    )


def _context(model: LanguageModel, config: EngineConfig) -> int:
    sees = model.context
    if config.context is None:
        return min(sees, _CONTEXT)
    if config.context > sees:
        raise ConfigError(
            f"context must be at most {sees} tokens, which is what this model sees, got {config.context}."
        )
    return config.context
