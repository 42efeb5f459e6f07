"""What a run will take, before it runs: the planner, GPU targets and ahead-of-time compilation."""

from cramjax.gpus import GPUS, Gpu
from cramjax.planning.fit import fit
from cramjax.planning.memory import KINDS, Memory, estimate_memory
from cramjax.planning.plan import Plan, plan
from cramjax.planning.steps import compile_here, compile_step
from cramjax.planning.targets import Compiled, compile_for, missing

__all__ = [
    "GPUS",
    "KINDS",
    "Compiled",
    "Gpu",
    "Memory",
    "Plan",
    "compile_for",
    "compile_here",
    "compile_step",
    "estimate_memory",
    "fit",
    "missing",
    "plan",
]
