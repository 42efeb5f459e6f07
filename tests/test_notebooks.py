"""Every notebook runs from top to bottom, on a budget and a corpus that are smaller than a reader's."""

import shutil
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `test`: nbformat and nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `test`: nbformat and nbclient")

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def small(corpus: Path) -> dict[str, Any]:
    return {
        "budget": "40steps",
        "changes": {
            "data": {"source": str(corpus / "*.txt"), "sequence_length": 32, "validation_fraction": 0.2},
            "tokenizer": {"vocab_size": 300},
            "model": {"layers": 1, "width": 32, "heads": 2, "mlp": 64},
            "batch": {"size": 8},
            "train": {"data_parallel": 1},
        },
    }


def with_parameters(notebook: Any, values: dict[str, Any]) -> Any:
    """The notebook with a cell after its `parameters` cell that sets variables, as papermill does."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1, "a notebook has one cell tagged `parameters`"
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(source))
    return notebook


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the notebook machinery, which runs in this process; the kernel is another
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, corpus: Path, tmp_path: Path):
    shutil.copy(path, tmp_path)
    notebook = with_parameters(nbformat.read(tmp_path / path.name, as_version=4), small(corpus))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [set(output.get("data", {})) for output in outputs]
    assert any("image/svg+xml" in kinds for kinds in shown), "the curves"
    assert sum("text/html" in kinds for kinds in shown) >= 3, "the run, its score, its text"
    assert list(tmp_path.glob("runs/*/report.html"))
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".txt"]


def test_notebooks_are_kept_without_machine_paths():
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text and str(Path.home()) not in text and str(NOTEBOOKS.parent) not in text, path.name
