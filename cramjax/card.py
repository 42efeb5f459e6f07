"""The model card of a run: what was trained, on what, for how long, how good it is, and how to use it."""

from collections.abc import Sequence

from cramjax.recipes import to_yaml
from cramjax.serve import Filling, Generation
from cramjax.training import Run
from cramjax.training.display import summary_figures

_BITS = "Bits per byte are of held-out text of the same source, every token scored once."
_PAIRS = (
    "Accuracy is the share of held-out pairs whose preferred answer became likelier than the other one, beside what "
    "the model gave before."
)
_SAMPLES = 3
_SAMPLE_CHARACTERS = 800


def model_card(run: Run, samples: Sequence[Generation | Filling] = ()) -> str:
    """The card of a finished run, as Markdown.

    Args:
        run: with its summary.
        samples: what it made of its prompts; the first few are shown.
    """
    config, summary = run.config, run.summary
    if config.labels is not None:
        return _classifier_card(run)
    causal, named = config.objective.causal, config.source
    source = named if isinstance(named, str) else ", ".join(named)
    model, kind = config.model, "causal" if causal else "masked"
    parts = [
        f"# A {kind} language model: {model.layers} layers × {model.width}, context {config.context}",
        f"Trained by CramJAX on a budget of {config.budget}, from the text of `{source}`"
        + (f", starting from the weights of `{config.start_from}`" if config.start_from else "")
        + (f", on {summary['device']}." if summary.get("device") else "."),
        "## Scores",
        _table([*summary_figures(summary), *_baselines(summary.get("baselines") or {})]),
        _PAIRS if config.objective.kind == "preference" else _BITS,
        "## Use",
        _fenced(_commands(causal)),
        "In Python:",
        _fenced(_python(causal), "python"),
    ]
    if samples:
        parts += ["## Samples", *(_fenced(str(sample)[:_SAMPLE_CHARACTERS], "text") for sample in samples[:_SAMPLES])]
    parts += [
        "## How it was trained",
        "The whole configuration; saved as a YAML file it is a recipe for `cramjax train`.",
        _fenced(to_yaml(config).rstrip(), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _classifier_card(run: Run) -> str:
    """The card of a model that gives labels."""
    config, classifier = run.config, run.config.model.classifier
    named = ", ".join(classifier.labels) if classifier and classifier.labels else "a number"
    source = config.source if isinstance(config.source, str) else ", ".join(config.source)
    figures = [
        ("held-out loss, per text", value) if name.startswith("loss") else (name, value)
        for name, value in summary_figures(run.summary)
    ]
    parts = [
        f"# A classifier of texts: {named}",
        f"Tuned by CramJAX on a budget of {config.budget}, on `{source}`, from the weights of `{config.start_from}`.",
        "## Scores",
        _table(figures),
        "## Use",
        _fenced("cramjax evaluate MODEL --labels FILE"),
        "## How it was trained",
        _fenced(to_yaml(config).rstrip(), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _baselines(scores: dict[str, float]) -> list[tuple[str, str]]:
    return [(f"the same text by {name}, bits per byte", f"{score:.3f}") for name, score in scores.items()]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _commands(causal: bool) -> str:
    use = 'cramjax generate MODEL "a prompt"' if causal else 'cramjax fill-mask MODEL "a text with a [MASK]"'
    return "\n".join(
        [
            use,
            "cramjax evaluate MODEL --text FILE",
            "cramjax train RECIPE --model.from=MODEL   # go on training, on other text or with another budget",
            "cramjax export MODEL --format hf --out DIR",
        ]
    )


def _python(causal: bool) -> str:
    use = 'print(cramjax.generate(model, "a prompt"))' if causal else "cramjax.evaluate(model, 'file.txt')"
    return f"import cramjax\n\nmodel = cramjax.load('MODEL')\n{use}"


def _fenced(text: str, language: str = "") -> str:
    """A block of code; its fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
