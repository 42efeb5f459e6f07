"""What is measured after a run: text, tasks over labelled data, and baselines on the same held-out text.

`cramjax.evaluation.harness` is the adapter for lm-evaluation-harness, which is not installed with CramJAX.
"""

from cramjax.evaluation.baselines import baselines
from cramjax.evaluation.labels import Predictions, compare_on_labels, evaluate_labels, predict
from cramjax.evaluation.likelihood import Likelihood, loglikelihoods, pseudo_loglikelihoods
from cramjax.evaluation.results import Score, ScoreComparison, ScoreDifference, Scores, TaskScores
from cramjax.evaluation.run import compare_on_tasks, evaluate_tasks
from cramjax.evaluation.task import Task, TaskConfig, load_task, task_names
from cramjax.evaluation.text import evaluate_text

__all__ = [
    "Likelihood",
    "Predictions",
    "Score",
    "ScoreComparison",
    "ScoreDifference",
    "Scores",
    "Task",
    "TaskConfig",
    "TaskScores",
    "baselines",
    "compare_on_labels",
    "compare_on_tasks",
    "evaluate_labels",
    "evaluate_tasks",
    "evaluate_text",
    "load_task",
    "loglikelihoods",
    "predict",
    "pseudo_loglikelihoods",
    "task_names",
]
