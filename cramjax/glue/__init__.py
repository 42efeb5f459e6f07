"""Cramming's protocol of fine-tuning: GLUE's tasks where their files are there, or any other labelled tasks."""

from cramjax.glue.protocol import GLUE, Task, load_tasks
from cramjax.glue.results import SeedScores, TaskResult, Tuned
from cramjax.glue.run import run_protocol

__all__ = ["GLUE", "SeedScores", "Task", "TaskResult", "Tuned", "load_tasks", "run_protocol"]
