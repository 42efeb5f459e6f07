"""What a run will take, before it runs: GPU targets and ahead-of-time compilation."""

from cramjax.gpus import GPUS, Gpu
from cramjax.planning.steps import compile_step
from cramjax.planning.targets import Compiled, compile_for, missing

__all__ = ["GPUS", "Compiled", "Gpu", "compile_for", "compile_step", "missing"]
