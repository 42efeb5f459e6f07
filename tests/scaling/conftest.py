"""A tiny sweep: three trials of a budget of FLOPs each, on the tiny corpus; a second or two a trial once compiled."""

from pathlib import Path

import pytest
import yaml

from tests.training.conftest import TINY


@pytest.fixture
def tiny_sweep(corpus: Path, cache_directory: Path, tmp_path: Path) -> Path:
    """The sweep's file."""
    fields = {
        **TINY,
        "data.source": str(corpus / "*.txt"),
        "evaluate.points": 4,
        "checkpoint.points": 40,
        "train.log_points": 100,
    }
    del fields["budget"]
    axes = {"isoflop": {"budgets": ["1e10flop", "15e9flop"], "sizes": [["12.3k", "28.7k"], ["28.7k"]]}}
    file = tmp_path / "tiny.yaml"
    file.write_text(
        yaml.safe_dump({"base": "quickstart", "set": {**fields, "model.layers": 1}, "axes": axes}), encoding="utf-8"
    )
    return file
