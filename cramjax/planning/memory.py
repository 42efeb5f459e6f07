"""Bytes of a training step, from its configuration alone."""

from cramjax.config import RunConfig
from cramjax.gpus import Gpu
from cramjax.planning.buffers import Step
from cramjax.planning.buffers_cpu import CpuStep
from cramjax.planning.kinds import KINDS, Memory

__all__ = ["KINDS", "Memory", "estimate_memory"]


def estimate_memory(config: RunConfig, *, vocab_size: int, compute_dtype: str, gpu: Gpu | None) -> Memory:
    """Memory of a configuration's training step.

    Args:
        config: the run; `batch.microbatch`, `train` and `optim` say what is to fit.
        vocab_size: tokens of its vocabulary, without padding.
        compute_dtype: precision of activations, `float32` or `bfloat16`.
        gpu: the card; None: a CPU.
    """
    step = CpuStep if gpu is None else Step
    return step(config, vocab_size, compute_dtype, gpu).memory()
