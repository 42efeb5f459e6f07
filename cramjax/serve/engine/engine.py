"""Many requests at once, over one model: admit, read prompts, draw tokens, give pages back.

The engine is not for several threads: one calls `add`, `cancel` and `step`. What it computes is in `programs`, what it
decides in `schedule`, who has which page in `pages`.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cramjax.compiling import keep_programs
from cramjax.errors import ConfigError, RunError
from cramjax.kernels.packed import prompt_of
from cramjax.language_model import LanguageModel
from cramjax.model.stack import virtual_tokens
from cramjax.serve.constraints import words_of
from cramjax.serve.engine.batch import Listener, Task, make_rows, make_shapes
from cramjax.serve.engine.compiled import compilations, compile_all
from cramjax.serve.engine.draw import needs_history, ways
from cramjax.serve.engine.lookup import Lookup
from cramjax.serve.engine.pages import PagePool, page_keys
from cramjax.serve.engine.programs import MOST_STEPS, STOPS, Drawn, Logprobs, Rows, make_pool, prefill, step, verify
from cramjax.serve.engine.schedule import pages_for, plan_pieces, plan_steps
from cramjax.serve.generate import never_drawn
from cramjax.serve.request import Progress, Reason, Request, SamplingParameters, TokenLogprob
from cramjax.serving import EngineConfig

_CONTEXT = 4096
"""Tokens of a request, where nothing is said and the model sees more."""
_FEW = 4
"""Tokens that each draws in a call while others wait for their prompts to be read."""
_SCORED = 64
"""Tokens of a piece whose log-probabilities are wanted: their logits are all there at once."""


@dataclass(frozen=True)
class Load:
    """What the engine holds now, and has done so far."""

    running: int
    waiting: int
    waiting_tokens: int
    """Tokens of the prompts that wait."""
    pages: int
    pages_used: int
    prefix_queries: int
    """Pages of prompts that were looked for."""
    prefix_hits: int
    """Those that were there."""
    preemptions: int
    """Requests that gave their pages up, to be computed again."""
    prompt_tokens: int
    drawn_tokens: int
    guessed_tokens: int
    """Tokens guessed from how texts went on before."""
    right_guesses: int
    """Those that the model drew too."""
    compilations: int
    """Programs compiled since the start: a fault, if any."""


class Engine:
    """Continues the prompts of many requests together."""

    def __init__(self, model: LanguageModel, config: EngineConfig | None = None):
        """Compile all programs, and check that decoding token by token gives what the whole forward pass gives.

        Args:
            model: a causal one.
            config: what it may take.

        Raises:
            RunError: the model is not causal, or is computed wrong here.
            ConfigError: limits that contradict each other.
        """
        if model.kind != "causal":
            raise RunError(f"{model.path} is a {model.kind} model, which does not continue text.")
        if count := virtual_tokens(model.params):
            raise RunError(
                f"{model.path} has {count} virtual tokens (a prompt or a prefix), which this engine's pages have no "
                "place for: continue text by `cramjax generate`, or tune by lora, which can be merged."
            )
        if prompt_of(model.params["embed"]["token"]["table"]) is not None:
            raise RunError(f"{model.path} has a prompt of virtual tokens, which only `generate` holds.")
        config = config or EngineConfig()
        keep_programs()
        size = config.page
        self.config = config
        self.context = _context(model, config)
        self.vocab_size = model.model.vocab_size
        self._row_pages = pages_for(self.context, size)
        held = config.cache_tokens or min(config.slots, 4) * self.context
        if held < self.context:
            raise ConfigError(f"cache_tokens must hold one context ({self.context} tokens), got {held}.")
        self.pool = PagePool(pages_for(held, size) + 1, size)
        self._language_model = model
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._slots = list(range(config.slots))[::-1]
        self._numbers = itertools.count()
        self._preemptions = self._prompt_tokens = self._drawn_tokens = 0
        self._device = make_pool(model.model, self.pool.pages, size, config.slots)
        if config.lookup and config.deterministic:
            raise ConfigError("lookup must be 0 with deterministic=true: calls that verify guesses have another shape.")
        self._lookup = Lookup(config.lookup)
        self._reuse = config.prefix_cache and not config.deterministic
        self._shapes = make_shapes(config, self._row_pages)
        self._scored = min(_SCORED, self._row_pages * size)
        self._programs = self._compiled()
        self._check()
        self._preemptions = self._prompt_tokens = self._drawn_tokens = 0
        self._lookup = Lookup(config.lookup)
        self._compiled_at_start = compilations()

    def add(self, request: Request, listener: Listener) -> int:
        """Let a request wait for its turn; `step` will tell the listener how it goes.

        Returns:
            Its number, for `cancel`.

        Raises:
            ConfigError: no tokens, tokens that are none, or more than the context.
        """
        longest = len(request.prompt) + request.max_tokens
        if not request.prompt:
            raise ConfigError("prompt must have one token or more, got none.")
        if request.max_tokens < 0 or (request.max_tokens == 0 and not request.prompt_logprobs):
            raise ConfigError(f"max_tokens must be 1 or more, got {request.max_tokens}.")
        if longest > self.context:
            raise ConfigError(
                f"prompt and max_tokens must be at most {self.context} tokens together (the context), got "
                f"{len(request.prompt)} and {request.max_tokens}."
            )
        wrong = [token for token in request.prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise ConfigError(f"prompt must be tokens from 0 to {self.vocab_size - 1}, got {wrong[0]}.")
        for token, _ in request.sampling.logit_bias:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"logit_bias must be of tokens from 0 to {self.vocab_size - 1}, got {token}.")
        if len(request.sampling.logit_bias) > _BIASES:
            raise ConfigError(f"logit_bias must have at most {_BIASES} tokens, got {len(request.sampling.logit_bias)}.")
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
        return bool(drawing or reading)

    def load(self) -> Load:
        """What it holds and has done."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=sum(len(task.tokens) for task in self._waiting),
            pages=self.pool.pages - 1,
            pages_used=self.pool.pages - 1 - self.pool.free,
            prefix_queries=self.pool.queried,
            prefix_hits=self.pool.found,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            drawn_tokens=self._drawn_tokens,
            guessed_tokens=self._lookup.guesses,
            right_guesses=self._lookup.right,
            compilations=compilations() - self._compiled_at_start,
        )

    # Who comes in and who goes out.

    def _admit(self) -> None:
        while self._waiting and self._slots:
            task = self._waiting[0]
            size = self.pool.size
            keys = page_keys(task.tokens, size, task.salt) if self._reuse and not task.scores else []
            # At least one token is computed: the last one's logits are needed.
            found = self.pool.match(keys[: (len(task.tokens) - 1) // size])
            pages = self.pool.take(pages_for(len(task.tokens), size) - len(found))
            if pages is None:
                self.pool.release(found)
                return
            self._waiting.popleft()
            task.pages, task.keys, task.slot = [*found, *pages], keys[: len(found)], self._slots.pop()
            task.computed = len(found) * size
            if task.cached is None:
                task.cached = task.computed
                self._prompt_tokens += len(task.tokens)
            self._running.append(task)
            if needs_history(task.request.sampling):
                self._begin_history(task)

    def _leave(self, task: Task) -> None:
        self.pool.release(task.pages)
        self._slots.append(task.slot)
        self._running.remove(task)
        task.pages, task.keys, task.computed, task.slot = [], [], 0, -1

    def _end(self, task: Task, reason: Reason, progress: Progress | None = None) -> None:
        if task in self._waiting:
            self._waiting.remove(task)
        else:
            self._leave(task)
        given = progress or Progress()
        task.listener(Progress(given.tokens, given.logprobs, given.prompt_logprobs, task.cached or 0, reason))

    def _preempt(self, task: Task) -> None:
        self._preemptions += 1
        self._leave(task)
        self._waiting.appendleft(task)

    def _know(self, task: Task) -> None:
        """Let others find its full pages."""
        if self._reuse:
            full = task.computed // self.pool.size
            if full > len(task.keys):
                keys = page_keys(task.tokens[: full * self.pool.size], self.pool.size, task.salt)
                for page, key in list(zip(task.pages, keys, strict=False))[len(task.keys) : full]:
                    self.pool.know(page, key)
                task.keys = keys

    # What is computed.

    def _draw(self, tasks: list[Task], few: bool) -> None:
        by_number = {task.number: task for task in self._running}
        guesses = self._guesses(tasks)
        most = 1 + self._lookup.most if guesses else _FEW if few or self._lookup.most else MOST_STEPS
        if not guesses and any(task.request.constraint is not None for task in tasks):
            most = 1  # what may come next is known when it is known what came
        drawing, others = [task.held() for task in tasks], [t.held() for t in self._running if t not in tasks]
        plan = plan_steps(drawing, others, self.pool.free, self.pool.size, most)
        for number in plan.preempted:
            self._preempt(by_number[number])
        chosen = [by_number[number] for number in plan.numbers]
        if not chosen:
            return
        for task in chosen:
            tokens = task.computed + min(plan.steps, task.room)
            missing = max(pages_for(tokens, self.pool.size) - len(task.pages), 0)
            taken = self.pool.take(missing)
            assert taken is not None, "planned for"
            task.pages += taken
        if guesses:
            self._verify(chosen, [guesses.get(task.number, [])[: plan.steps - 1] for task in chosen])
            return
        batch = next(size for size in self._shapes.step if size >= len(chosen))
        rows = self._batch(chosen, [[task.tokens[-1]] for task in chosen], (batch, 1))
        self._device, drawn = self._programs["step", batch, rows.table.shape[1]](
            self._language_model.params, self._device, rows, np.int32(plan.steps)
        )
        self._hand_out(chosen, jax.device_get(drawn), held=1)

    def _guesses(self, tasks: list[Task]) -> dict[int, list[int]]:
        """Guesses by the numbers of the requests that have any."""
        if len(tasks) > max(self._shapes.verify, default=0):
            return {}
        return {task.number: guesses for task in tasks if (guesses := self._lookup.ask(task))}

    def _verify(self, tasks: list[Task], guesses: list[list[int]]) -> None:
        batch, long = next(size for size in self._shapes.verify if size >= len(tasks)), 1 + self._lookup.most
        read = [[task.tokens[-1], *own] for task, own in zip(tasks, guesses, strict=True)]
        rows = self._batch(tasks, read, (batch, long))
        self._device, drawn = self._programs["verify", batch, rows.table.shape[1]](
            self._language_model.params, self._device, rows
        )
        drawn = jax.device_get(drawn)
        for row, (task, own) in enumerate(zip(tasks, guesses, strict=True)):
            self._lookup.tell(task, len(own), int(drawn.counts[row]))
        self._hand_out(tasks, drawn, held=1)

    def _read(self, tasks: list[Task]) -> None:
        first = tasks[0]
        if first.scores:
            tasks, shapes, kind = [first], [(1, self._scored)], "score"
        else:
            tasks, shapes, kind = [task for task in tasks if not task.scores], self._shapes.prefill, "prefill"
        by_number = {task.number: task for task in tasks}
        (batch, long), pieces = plan_pieces([task.held() for task in tasks], shapes)
        chosen = [by_number[number] for number, _ in pieces]
        counts = [count for _, count in pieces]
        read = [task.tokens[task.computed : task.computed + n] for task, n in zip(chosen, counts, strict=True)]
        rows = self._batch(chosen, read, (batch, long))
        arguments: list[Any] = [self._language_model.params, self._device, rows]
        if kind == "score":
            targets = np.zeros((1, long), np.int32)
            after = first.tokens[first.computed + 1 : first.computed + counts[0] + 1]
            targets[0, : len(after)] = after
            arguments.append(targets)
        self._device, drawn = self._programs[kind, batch, long, rows.table.shape[1]](*arguments)
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
            progress = Progress(tuple(tokens), logprobs, scored, task.cached or 0)
            if reason is None:
                task.listener(progress)
            else:
                self._end(task, reason, progress)

    def _batch(self, tasks: Sequence[Task], read: Sequence[Sequence[int]], shape: tuple[int, int]) -> Rows:
        return make_rows(self._language_model.model, self._shapes, tasks, read, shape)

    def _begin_history(self, task: Task) -> None:
        prompt, drawn = (
            np.full(self.context, self.vocab_size, np.int32),
            np.full(self.context, self.vocab_size, np.int32),
        )
        own = len(task.request.prompt)
        prompt[:own], drawn[: task.drawn] = task.tokens[:own], task.tokens[own:]
        biased, bias = np.full(_BIASES, self.vocab_size, np.int32), np.zeros(_BIASES, np.float32)
        for place, (token, value) in enumerate(task.request.sampling.logit_bias):
            biased[place], bias[place] = token, value
        self._device = self._programs["begin"](None, self._device, np.int32(task.slot), prompt, drawn, biased, bias)

    def _compiled(self) -> dict[Any, Callable[..., Any]]:
        model, params = self._language_model.model, self._language_model.params
        banned = never_drawn(self._language_model.tokenizer, self.vocab_size)
        nobody = SamplingParameters(temperature=0.0)
        programs: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

        def rows(batch: int, long: int, width: int) -> Rows:
            places = width * self.pool.size if model.config.mask_documents else 0
            row, integer = np.zeros(batch, np.int32), np.int32
            return Rows(
                tokens=np.zeros((batch, long), integer),
                counts=row,
                held=row,
                last=row,
                segment=row,
                segments=np.zeros((batch, places), integer),
                table=np.zeros((batch, width), integer),
                slots=row,
                drawn=row,
                room=row,
                stops=np.zeros((batch, STOPS), integer),
                logprobs=row.astype(bool),
                ways=ways([nobody], batch),
                allowed=np.zeros((batch, words_of(self.vocab_size)), integer),
                constrained=row.astype(bool),
            )

        reads = functools.partial(prefill, model, banned, False)
        scores = functools.partial(prefill, model, banned, True)
        steps = functools.partial(step, model, banned)
        for batch, long in self._shapes.prefill:
            for width in self._shapes.widths(long):
                arguments = params, self._device, rows(batch, long, width)
                programs["prefill", batch, long, width] = functools.partial(_untargeted, reads), arguments
        for batch in self._shapes.step:
            for width in self._shapes.pages:
                arguments = params, self._device, rows(batch, 1, width), np.int32(0)
                programs["step", batch, width] = steps, arguments
        for batch in self._shapes.verify:
            for width in self._shapes.widths(1 + self._lookup.most):
                arguments = params, self._device, rows(batch, 1 + self._lookup.most, width)
                programs["verify", batch, width] = functools.partial(verify, model, banned), arguments
        for width in self._shapes.widths(self._scored):
            targets = np.zeros((1, self._scored), np.int32)
            arguments = params, self._device, rows(1, self._scored, width), targets
            programs["score", 1, self._scored, width] = scores, arguments
        tokens, biases = np.zeros(self.context, np.int32), np.zeros(_BIASES, np.int32)
        begin = None, self._device, np.int32(0), tokens, tokens, biases, biases.astype(np.float32)
        programs["begin"] = _begin, begin
        return compile_all(programs, donate=(1,))

    def _check(self) -> None:
        """Decode a few tokens, and compare with the whole forward pass.

        Some releases of jax compute wrong results on CPUs (0.10.2: https://github.com/jax-ml/jax/issues/39103).
        """
        model, params = self._language_model.model, self._language_model.params
        length = min(8, self.context)
        if length < 3:
            return
        prompt = tuple(int(token) for token in np.linspace(0, self.vocab_size - 1, length - 2))
        got: list[Progress] = []
        sampling = SamplingParameters(temperature=0.0)
        self.add(Request(prompt, 2, sampling, top_logprobs=0), got.append)
        while self.step():
            pass
        logprobs = [each for progress in got for each in progress.logprobs]
        whole = jnp.asarray([[*prompt, *(each.token for each in logprobs)]], jnp.int32)

        @jax.jit
        def expected(params: Any, tokens: Any) -> Any:
            logits = model.logits(params, model.hidden(params, tokens)).astype(jnp.float32)
            return jax.nn.log_softmax(logits, axis=-1)[0, len(prompt) - 1 : -1]

        right = np.asarray(expected(params, whole))
        errors = [abs(each.logprob - row[each.token]) for each, row in zip(logprobs, right, strict=True)]
        allowed = 1e-3 if model.compute_dtype == "float32" else 0.2
        if not max(errors) <= allowed:
            raise RunError(
                f"this model is computed wrong here: log-probabilities of tokens drawn one after the other are off by "
                f"{max(errors):.3g} (jax {jax.__version__}, {jax.default_backend()}): use another release of jax."
            )


_BIASES = 300
"""Tokens whose logits a request can change (OpenAI's limit)."""


def _untargeted(reads: Callable[..., Any], params: Any, pool: Any, rows: Any) -> Any:
    return reads(params, pool, rows, None)


def _begin(nothing: None, pool: Any, *what: Any) -> Any:
    return type(pool)(pool.pages, pool.history.begun(*what))


def _logprob(token: int, given: Logprobs, place: tuple[int, int], top: int) -> TokenLogprob:
    likeliest = zip(given.top_tokens[place][:top], given.top[place][:top], strict=True)
    return TokenLogprob(token, float(given.of_token[place]), tuple((int(t), float(p)) for t, p in likeliest))


def _context(model: LanguageModel, config: EngineConfig) -> int:
    sees = model.context
    if config.context is None:
        return min(sees, _CONTEXT)
    if config.context > sees:
        raise ConfigError(
            f"context must be at most {sees} tokens, which is what this model sees, got {config.context}."
        )
    return config.context
