"""Every notebook runs from top to bottom, on less than a reader gives it, and shows what it is for."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `test`: nbformat and nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `test`: nbformat and nbclient")

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def tiny(corpus: Path) -> dict[str, Any]:
    """Fields of a recipe that make it a matter of a second, once compiled."""
    return {
        "data": {"source": str(corpus / "*.txt"), "sequence_length": 32, "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "model": {"layers": 1, "width": 32, "heads": 2, "mlp": 64},
        "batch": {"size": 8},
        "train": {"data_parallel": 1},
    }


@dataclass(frozen=True)
class Shown:
    """What a notebook left: its outputs by kind, and its files."""

    html: list[str]
    svg: list[str]
    text: str
    """All that was printed."""
    folder: Path

    def numbers(self, pattern: str) -> list[float]:
        """The groups of a pattern that must be in what was printed, as numbers."""
        match = re.search(pattern, self.text)
        assert match, f"{pattern!r} is not in:\n{self.text}"
        return [float(group.replace("\N{MINUS SIGN}", "-")) for group in match.groups()]


def shown(notebook: Any, folder: Path) -> Shown:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [output.get("data", {}) for output in outputs]
    return Shown(
        html=[data["text/html"] for data in kinds if "text/html" in data],
        svg=[data["image/svg+xml"] for data in kinds if "image/svg+xml" in data],
        text="".join(o["text"] for o in outputs if o.output_type == "stream" and o["name"] == "stdout"),
        folder=folder,
    )


def quickstart(left: Shown) -> None:
    assert len(left.html) >= 3, "the run, its score, its text"
    assert list(left.folder.glob("runs/*/report.html"))
    assert not [file for file in left.folder.iterdir() if file.suffix == ".txt"]


def recipe_ablations(left: Shown) -> None:
    (comparison,) = [html for html in left.html if "B − A" in html]
    assert re.search(r"(B is better|A is better|not settled): .*95% interval .* 2 pairs", comparison)
    # The interval worked out in the notebook is that of `compare`, and that of its file.
    mean, margin = left.numbers(r"n = 2:\s+([+-][\d.]+) ± ([\d.]+)")
    low, high = left.numbers(r"compare says: \(([-\d.e]+), ([-\d.e]+)\)")
    assert (low, high) == pytest.approx((mean - margin, mean + margin), abs=2e-4) and low < high
    kept = json.loads((left.folder / "runs" / "ablation-0" / "comparison.json").read_text(encoding="utf-8"))
    assert (
        kept["interval"] == [low, high]
        and kept["pairs_counted"] == 2
        and set(kept["differing"])
        == {
            "optim.name",
            "optim.lr",
        }
    )
    _, _, unpaired, paired = left.numbers(
        r"A varies by ([\d.]+), B by ([\d.]+)\n.* would vary by ([\d.]+), that of pairs by ([\d.]+)"
    )
    assert unpaired > 0 and paired > 0
    assert left.numbers(r"2 pairs run, (?:\d+|None) needed; a pair's difference varies by ([\d.]+)") == [paired]


def scaling_laws(left: Shown) -> None:
    rows = pq.read_table(left.folder / "sweeps" / "laws" / "runs.parquet").to_pylist()
    assert len(rows) == 8 and {row["status"] for row in rows} == {"done"}
    fitted, advised = left.html[-3:-1]
    assert "L = E + A/N^α + B/D^β, 8 rows" in fitted and "bits per byte" in advised
    exponent, low, high = left.numbers(r"parametric +N\* ∝ C\^(\S+) +\(95% interval (\S+) to (\S+)\)")
    assert 0 < exponent < 1 and low <= exponent <= high
    predicted, low, high = left.numbers(r"predicted ([\d.]+) bits per byte \(95% interval (\S+) to (\S+)\)")
    reached, error = left.numbers(r"reached   ([\d.]+): ([+-][\d.]+), (?:inside|outside) the interval")
    assert low <= predicted <= high and error == pytest.approx(reached - predicted, abs=2e-3)
    # The law is of runs at no more than a half of this budget: it cannot be far off.
    assert reached == pytest.approx(predicted, rel=0.4)
    assert reached < max(row["bits_per_byte"] for row in rows)


def inside_the_step(left: Shown) -> None:
    plan, profile = (next(html for html in left.html if word in html) for word in ("policy", "traced steps"))
    assert all(policy in plan for policy in ("none", "selective", "full", "offload"))
    assert all(kind in left.svg[1] for kind in ("weights", "gradients", "optimizer", "activations"))
    shares = {part: float(share) for part, share in re.findall(r"<th>([^<]+)</th><td>([\d.]+)%", profile)}
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert {"layer/attention", "layer/attention (backward)", "layer/mlp", "cross_entropy", "optimizer"} <= set(shares)
    assert min(left.numbers(r"AdamW, offloaded +([\d.]+) GiB on the card, +([\d.]+) GiB on the host")) > 1
    flops, size, intensity = left.numbers(
        r"FLOPs +([\d.]+) GFLOP .*\nbytes accessed +([\d.]+) GB a step\nintensity +([\d.]+) FLOP"
    )
    assert flops > 0 and size >= 0 and intensity > 0
    utilisation, said = left.numbers(r"GFLOP/s: ([\d.]+)% \(the run says ([\d.]+)%\)")
    assert utilisation == pytest.approx(said, abs=0.11)


def tune(left: Shown) -> None:
    scores = dict(re.findall(r"^(.+?) +([\d.]+) bits per byte$", left.text, re.MULTILINE))
    assert set(scores) == {"no pretraining", "pretrained", "pretrained, LoRA"}
    assert all(0 < float(score) < 20 for score in scores.values())
    right = re.findall(r"([\d.]+) right \(95%: ([\d.]+) to ([\d.]+)\)", left.text)
    assert len(right) == 4 and all(float(low) <= float(value) <= float(high) for value, low, high in right)
    assert any("excludes 0" in html or "includes 0" in html for html in left.html)
    lessons, questions = left.numbers(r"(\d+) lessons, (\d+) questions")
    assert lessons > 100 and questions == 12


def use_it(left: Shown) -> None:
    assert len(re.findall(r"the same text: True", left.text)) == 3 and "the same text: False" not in left.text
    right, guessed = left.numbers(r"(\d+) of (\d+) guesses right")
    assert 0 <= right <= guessed
    assert "models: ['used']" in left.text and "ended with 0" in left.text
    speeds = re.findall(r"^ +(\d+) prompts: +(\d+) tokens/s$", left.text, re.MULTILINE)
    assert [int(batch) for batch, _ in speeds] == [1, 3] and all(int(speed) > 0 for _, speed in speeds)


def compress(left: Shown) -> None:
    found = re.findall(r"^(\S+, .+?) +([\d.]+) bits a weight ([\d.]+) bits per byte$", left.text, re.MULTILINE)
    bits, scores = ({row[0]: float(row[place]) for row in found} for place in (1, 2))
    (whole,) = left.numbers(r"as trained +([\d.]+) bits per byte")
    assert len(found) == 9 and scores["rtn, 8 bits"] == pytest.approx(whole, abs=5e-3)
    assert bits["gptq, 4 bits"] == bits["rtn, 4 bits"] == pytest.approx(4.5, abs=0.01)
    assert scores["rtn, 2 bits"] > scores["rtn, 8 bits"]
    best, of = left.numbers(r"(\d+) of (\d+) points are worth having")
    assert 1 <= best <= of == 9
    assert len(re.findall(r"^(?:as trained|gptq, . bits|rtn, 2 bits) +\[", left.text, re.MULTILINE)) == 4


def small(name: str, corpus: Path) -> dict[str, Any]:
    """A notebook's parameters for here."""
    changes = tiny(corpus)
    match name:
        case "01_quickstart":
            return {"budget": "40steps", "changes": changes}
        case "02_recipe_ablations":
            ablations = {"AdamW, not Muon": {"optim": {"name": "adamw", "lr": 3e-3}}}
            return {"budget": "20steps", "seeds": 2, "changes": changes, "ablations": ablations}
        case "03_scaling_laws":
            changes["model"] = {"heads": 24, "adaptive_head": []}
            return {
                "budgets": ["2e9flop", "5e9flop"],
                "sizes": [["5.9k", "13.3k", "22.3k", "32.8k"]] * 2,
                "budget": "1e10flop",
                "changes": changes,
            }
        case "04_inside_the_step":
            changes["train"]["profile"] = True
            return {"microbatches": [1, 8], "budget": "20steps", "changes": changes}
        case "05_use_it":
            changes["data"]["sequence_length"] = 64
            return {"budget": "20steps", "tokens": 40, "batches": [1, 3], "changes": changes}
        case "06_tune":
            changes["data"]["sequence_length"] = 128
            return {"budget": "20steps", "tuning": "8steps", "limit": 12, "changes": changes}
        case "07_compress":
            return {"budget": "20steps", "sequences": 4, "changes": changes}
    raise KeyError(name)


CHECKS: dict[str, tuple[int, Callable[[Shown], None]]] = {
    "01_quickstart": (1, quickstart),
    "02_recipe_ablations": (2, recipe_ablations),
    "03_scaling_laws": (2, scaling_laws),
    "04_inside_the_step": (4, inside_the_step),
    "05_use_it": (1, use_it),
    "06_tune": (2, tune),
    "07_compress": (2, compress),
}
"""For each notebook: how many figures it has, and what else it must show."""


def with_parameters(notebook: Any, values: dict[str, Any]) -> Any:
    """The notebook with a cell after its `parameters` cell that sets variables, as papermill does."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1, "a notebook has one cell tagged `parameters`"
    for name in values:
        assert re.search(rf"^{name}\b.* = ", notebook.cells[tagged[0]].source, re.MULTILINE), f"{name} is no parameter"
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(source))
    return notebook


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the notebook machinery, which runs in this process; the kernel is another
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, corpus: Path, tmp_path: Path):
    shutil.copy(path, tmp_path)
    notebook = with_parameters(nbformat.read(tmp_path / path.name, as_version=4), small(path.stem, corpus))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    left, (figures, check) = shown(notebook, tmp_path), CHECKS[path.stem]
    assert len(left.svg) == figures
    assert not any("nan" in figure.lower() for figure in left.svg)
    check(left)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_its_figures_and_without_machine_paths(path: Path):
    text = path.read_text(encoding="utf-8")
    for place in ("/home/", "/root/", "/tmp/", str(Path.home()), str(NOTEBOOKS.parent)):
        assert place not in text, place
    notebook = nbformat.read(path, as_version=4)
    assert len(shown(notebook, NOTEBOOKS).svg) == CHECKS[path.stem][0]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or (o.output_type == "stream" and o["name"] == "stderr")]
