"""The plan of offloaded generation: which policy, what it takes of each tier, how fast it will be; before anything is
generated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cramjax.errors import ConfigError, RunError
from cramjax.kernels.attention.pages import refusal as attention_refusal
from cramjax.kernels.packed import Virtual, is_packed
from cramjax.language_model.directory import StoredModel
from cramjax.offloading import OffloadConfig, parse_bytes
from cramjax.serve.decoding import choose, speeds
from cramjax.serve.offload.caches import FILLING
from cramjax.serve.offload.cost_model import Machine, Memory, Policy, Work, peak_memory
from cramjax.serve.offload.encoding import Encoding, Grouped, cache_shapes, encoding_of, token_bytes
from cramjax.serve.offload.layout import Layout, layout_of, parts_of, stage_shapes
from cramjax.serve.offload.measure import Disk, Measured, measure_disk
from cramjax.serve.offload.place import Placement, Tier, place, whole_rows
from cramjax.serve.offload.policy import COUNTS, Found, found_of, least_device, search
from cramjax.serve.offload.programs import Programs, computing, empty_text
from cramjax.serve.offload.store import free_bytes
from cramjax.serve.offload.walk import width_of
from cramjax.show.numbers import format_bytes
from cramjax.show.values import Viewed
from cramjax.start import start

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of a batch that are tried, and timed."""
_SHARE = 0.95
"""Of the limits: what estimates leave out is in the rest."""
_PATIENCE = 2
"""Larger batches in a row that are no faster, after which no larger one is timed."""


@dataclass(frozen=True)
class Setting:
    """A model, and how it is computed here."""

    stored: StoredModel
    layout: Layout
    encoding: Encoding
    by_kernel: bool
    device: Any
    host: Any

    @property
    def one_memory(self) -> bool:
        """Whether the device computes in the host's memory."""
        return self.device.platform == "cpu"

    @property
    def model(self) -> Any:
        """The functions of the model as it computes here."""
        return computing(self.stored.model.model, self.one_memory, self.by_kernel and attention_refusal() is None)

    @property
    def attends_on_host(self) -> bool:
        """Whether a cache in the host's memory is attended to there: not on a GPU where it must be decoded first."""
        return self.one_memory or not isinstance(self.encoding, Grouped)

    def programs(self, cached: tuple[slice, slice, slice]) -> Programs:
        """The programs of batches of which each tier holds some rows."""
        return Programs(self.model, self.encoding, cached, self.by_kernel)

    def cache_shape(self, rows: int, places: int) -> Any:
        """Shapes of the keys and values of some rows in a block."""
        sizes = self.model.sizes
        return cache_shapes(self.encoding, (rows, places), sizes.kv_heads, sizes.head_dim)


def setting_of(stored: StoredModel, config: OffloadConfig) -> Setting:
    """How a stored model is computed here.

    Raises:
        ConfigError: its weights cannot be held as asked.
        RunError: it is no causal model, or one with virtual tokens.
    """
    own = stored.model
    own.require_tokens()
    if own.kind != "causal":
        raise RunError(f"{own.path} is a {own.kind} model, which does not continue text.")
    if any(isinstance(leaf, Virtual) for leaf in jax.tree.leaves(own.params, is_leaf=is_packed)):
        raise RunError(
            f"{own.path} has virtual tokens (adapter.kind prompt or prefix), which offloaded generation does not keep: "
            "leave out --device_memory, or give a model tuned with lora or ia3."
        )
    if stored.tensors.coded:
        raise RunError(
            f"{own.path} has matrices that are stored by an entropy code, which are read whole: leave out "
            "--device_memory, or give the model that it was made of."
        )
    device = start()[0]
    precision = own.model.compute_dtype if config.weights == "auto" else config.weights
    kernel = device.platform == "cpu" and choose(speeds(), precision) == "kernel"
    dtype = "float32" if device.platform == "cpu" else own.model.compute_dtype
    layout = layout_of(stored, config.weights)
    host = jax.local_devices(backend="cpu")[0]
    return Setting(stored, layout, encoding_of(config.cache, dtype), kernel, device, host)


@dataclass(frozen=True)
class Limits:
    """What may be taken."""

    device: int
    host: int
    disk: Path

    @property
    def memory(self) -> int:
        """Of both kinds of memory."""
        return self.device + self.host


def limits_of(config: OffloadConfig, device: Any) -> Limits:
    """The limits of a configuration.

    Raises:
        ConfigError: one is missing or is no size.
        RunError: the directory cannot be used.
    """
    if config.disk is None:
        raise ConfigError("--disk must be a directory for what memory does not hold, got none: give one, such as /tmp.")
    disk = Path(config.disk).expanduser()
    free_bytes(disk)
    if config.device_memory is not None:
        memory = parse_bytes(config.device_memory, "--device_memory")
    elif device.platform == "cpu":
        raise ConfigError("--device_memory must be given where there is no GPU: a size such as 2GiB.")
    else:
        memory = int(device.memory_stats()["bytes_limit"] * 0.95)
    return Limits(memory, parse_bytes(config.host_memory, "--host_memory"), disk)


def work_of(setting: Setting, prompt: int, output: int) -> Work:
    """What is asked of a model, in the cost model's numbers. The head is spread over the blocks.

    Args:
        setting: the model.
        prompt: tokens of a row before the first that is drawn.
        output: tokens drawn for a row.
    """
    layout, model = setting.layout, setting.model
    sizes, layers, width = model.sizes, len(layout.blocks), model.config.width
    matrices = [leaf.shape for stage in layout.blocks for leaf in stage.leaves if len(leaf.shape.shape) == 2]
    number = jnp.dtype(model.compute_dtype).itemsize
    places = prompt + output
    plain = setting.attends_on_host and not isinstance(setting.encoding, Grouped)
    decoded = 0 if plain else 4 * places * sizes.kv_heads * sizes.head_dim
    return Work(
        layers=layers,
        weight_bytes=sum(stage.bytes for stage in layout.walked) / layers,
        cache_bytes=token_bytes(setting.encoding, sizes.kv_heads, sizes.head_dim),
        hidden_bytes=number * width,
        product_flops=2 * sum(math.prod(x.shape) for x in matrices) / layers,
        attention_flops=4 * sizes.heads * sizes.head_dim,
        interior_bytes=4 * (3 * width + 2 * sum(sizes.qkv) + 2 * sum(sizes.up)) + 4 * sizes.heads * min(prompt, 512),
        context_bytes=_context_bytes(setting, prompt) / prompt,
        row_bytes=8 * sizes.vocab + number * decoded,
        weight_pieces=sum(
            len(jax.tree.leaves(leaf.shape)) for s in layout.walked for leaf in s.leaves if not leaf.small
        )
        / layers,
        cache_pieces=len(jax.tree.leaves(setting.cache_shape(1, 1))),
        prompt=prompt,
        output=output,
        one_memory=setting.one_memory,
        filling=FILLING,
    )


def _context_bytes(setting: Setting, prompt: int) -> int:
    """Of what blocks read beside the stream, for a row."""
    programs = setting.programs((slice(0, 0), slice(0, 1), slice(1, 1)))
    embed = stage_shapes(setting.layout.embed, 1)
    rows = jax.ShapeDtypeStruct((1, prompt, setting.model.config.width), jnp.float32)
    tokens, counts = jax.ShapeDtypeStruct((1, prompt), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.eval_shape(partial(empty_text, setting.model, 1, prompt))
    context = jax.eval_shape(
        lambda *args: jax.tree.leaves(programs.embed(0, *args)[1]), embed, rows, text, tokens, counts
    )
    return sum(x.size * x.dtype.itemsize for x in context)


@dataclass(frozen=True, repr=False)
class OffloadPlan(Viewed):
    """How a model will generate within limits."""

    name: str
    model_bytes: int
    """Of all weights, as they are held."""
    limits: Limits
    prompts: int
    prompt: int
    """Tokens of the longest one, padded."""
    output: int
    policy: Policy
    """With the shares that whole tensors and rows have."""
    placement: Placement
    memory: Memory
    """The most that each tier will hold."""
    seconds: float
    """Of all prompts, when weights have been read once."""
    tokens_per_second: float
    considered: Sequence[Found]
    """The best of each size of a batch."""
    disk: Disk
    machine: Machine
    work: Work

    def json(self) -> Mapping[str, Any]:
        """What `--json` writes."""
        shares = {
            name: [own.device, own.host, own.disk]
            for name, own in (
                ("weights", self.policy.weights),
                ("cache", self.policy.cache),
                ("activations", self.policy.hidden),
            )
        }
        return {
            "model": self.name,
            "model_bytes": self.model_bytes,
            "device_memory": self.limits.device,
            "host_memory": self.limits.host,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
            "batch": self.policy.batch,
            "batches": self.policy.batches,
            "shares": shares,
            "device_bytes": self.memory.device,
            "host_bytes": self.memory.host,
            "disk_bytes": self.memory.disk,
            "disk_read_bytes_per_second": self.disk.read,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def __rich__(self) -> Any:
        from cramjax.serve.offload.show import page

        return page(self)


def make_plan(
    setting: Setting, config: OffloadConfig, lengths: Sequence[int], output: int, *, form: Any = "code"
) -> OffloadPlan:
    """Find the policy of least time for some prompts.

    Args:
        setting: the model.
        config: limits, and what the user has chosen already.
        lengths: tokens of each prompt.
        output: tokens drawn for each.
        form: how streams overlap.

    Raises:
        ConfigError: the limits do not hold one block and one row.
        RunError: the disk cannot be used.
    """
    limits = limits_of(config, setting.device)
    prompt = width_of(max(lengths))
    work = work_of(setting, prompt, output)
    layout = setting.layout
    table: Tier = "host" if layout.table is not None and 4 * layout.table.bytes <= limits.host else "disk"
    files = [path.file for path in setting.stored.dense.files.places.values()]
    disk = measure_disk(limits.disk, max(files, key=lambda f: f.stat().st_size))
    room = free_bytes(limits.disk) * 0.95 + (0 if _rewrites(setting) else sum(s.bytes for s in layout.walked))
    most = Memory(
        device=_SHARE * limits.device - layout.embed.bytes,
        host=_SHARE * limits.host - (layout.table.bytes if layout.table is not None and table == "host" else 0),
        disk=room,
    )
    programs = cache(lambda batch: setting.programs((slice(0, 0), slice(0, batch), slice(batch, batch))))
    measured = Measured(
        programs,
        layout,
        work,
        disk,
        setting.device,
        setting.cache_shape,
        setting.host,
        setting.attends_on_host,
        limits.disk,
    )

    def machine_of(batch: int) -> Machine:
        own = measured.machine(batch)
        return own if setting.attends_on_host else replace(own, attention_host=None)

    batches = _BATCHES if config.batch is None else (config.batch,)
    counts = COUNTS if config.batches is None else (config.batches,)

    def planned(ahead: int) -> tuple[list[Found], Policy, Placement, Memory] | None:
        """With so many stages on their way; None: that does not fit."""
        own, asked = replace(work, ahead=1.0 + ahead), most
        for attempt in range(8):
            found = list[Found]()
            fitting = tuple(batch for batch in batches if least_device(own, asked, batch) <= asked.device)
            for each in search(
                own,
                machine_of,
                asked,
                prompts=len(lengths),
                form=form,
                batches=fitting,
                counts=counts,
                finish=whole_rows,
            ):
                found.append(each)
                speeds = [f.tokens_per_second for f in found]
                if len(speeds) - 1 - speeds.index(max(speeds)) == _PATIENCE:
                    break
            if not found:
                return None
            best = max(found, key=lambda f: f.tokens_per_second)
            placement = place(layout, best.policy.weights, table, ahead)
            policy = replace(best.policy, weights=placement.shares)
            memory = _exact(own, policy, placement)
            over = max(0.0, memory.device - most.device), max(0.0, memory.host - most.host)
            if not any(over):
                return found, policy, placement, memory
            asked = Memory(asked.device - 2**attempt * over[0], asked.host - 2**attempt * over[1], room)
        return None

    made = planned(2) or planned(1)
    if made is None:
        raise _too_small(work, layout, limits, most, batches[0])
    found, policy, placement, memory = made
    final = found_of(work, machine_of(policy.batch), policy, prompts=len(lengths), form=form)
    beside = Memory(layout.embed.bytes, _SHARE * limits.host - most.host, 0)
    return OffloadPlan(
        name=setting.stored.model.path.name,
        model_bytes=layout.bytes,
        limits=limits,
        prompts=len(lengths),
        prompt=prompt,
        output=output,
        policy=policy,
        placement=placement,
        memory=Memory(memory.device + beside.device, memory.host + beside.host, memory.disk),
        seconds=len(lengths) * output / final.tokens_per_second,
        tokens_per_second=final.tokens_per_second,
        considered=found,
        disk=disk,
        machine=machine_of(policy.batch),
        work=work,
    )


def _exact(work: Work, policy: Policy, placement: Placement) -> Memory:
    """Peak bytes with whole tensors and the ring that is really made."""
    about = peak_memory(work, policy)
    ring = placement.ring - work.ahead * work.weight_bytes * policy.weights.disk
    if work.one_memory:
        return replace(about, device=about.device + ring)
    return replace(about, host=about.host + ring)


def _rewrites(setting: Setting) -> bool:
    """Whether leaves on the disk are held otherwise than they are stored."""
    sparse = setting.stored.dense.sparse
    return any(
        leaf.held is not None or any(name in sparse for name in parts_of(setting.stored, leaf))
        for leaf in setting.layout.blocks[0].leaves
        if not leaf.small
    )


def _too_small(work: Work, layout: Layout, limits: Limits, most: Memory, batch: int) -> ConfigError:
    """Which limit does not hold the least there is to hold, and what it must be."""
    least = least_device(replace(work, ahead=2.0), most, batch)
    rows = "a prompt" if batch == 1 else f"{batch} prompts"
    what = f"one block and the next one on its way, and {rows} of {work.prompt} tokens"
    if math.isinf(least):
        return ConfigError(
            f"--disk {limits.disk} and --host_memory must hold the model and the cache of {rows} of {work.prompt} "
            f"tokens; {format_bytes(most.disk)} and {format_bytes(limits.host)} do not: free some, or give more."
        )
    stages = max(layout.walked, key=lambda stage: stage.bytes)
    largest = max(leaf.bytes for stage in layout.walked for leaf in stage.leaves)
    enough = least + layout.embed.bytes + 2 * largest  # tensors are placed whole
    return ConfigError(
        f"--device_memory must hold {what}: {format_bytes(enough)} is enough, got {format_bytes(limits.device)} (the "
        f"{'head' if stages.name == 'head' else 'largest block'} has {format_bytes(stages.bytes)}). Give more, or "
        "shorter prompts, or --weights=int4."
    )
