"""`cramjax import` and `cramjax export`: models of others as ours, and ours as those of others."""

from collections.abc import Sequence

from cramjax.commands.common import Parser


def import_(words: Sequence[str]) -> None:
    """Make a model directory of another library's model."""
    parser = Parser(
        prog="cramjax import",
        description="Make a model directory of another library's model: GPT-2, Llama (SmolLM2), Mistral, Qwen 2 and 3, "
        "SmolLM3, Gemma 2 and 3 (text), NanoChat, BERT, RoBERTa, ModernBERT. `cramjax generate`, `fill-mask`, "
        "`evaluate` and `plan` take it as they take a run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="A Hugging Face directory, hub:NAME, or a GGUF file (extra: cramjax[gguf])."
    )
    parser.add_argument("--out", metavar="MODEL", required=True, help="The model directory to make.")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=None,
        help="Precision of the weights (default: bfloat16 if all are stored in it, else float32).",
    )
    args = parser.parse_args(words)
    from cramjax.language_model import import_model

    imported = import_model(args.source, args.out, dtype=args.dtype)
    print(f"{imported.path}: {imported.origin['family']}, {imported.parameters:,} parameters, {imported.kind}")


def export(words: Sequence[str]) -> None:
    """Write a model for other libraries."""
    parser = Parser(
        prog="cramjax export",
        description="Write a model for other libraries, where they have a class that computes exactly this model; else "
        "say which choices no class has.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="A model directory or a run directory.")
    parser.add_argument("--out", metavar="OUT", required=True, help="The directory (hf) or file (gguf) to make.")
    parser.add_argument(
        "--format",
        choices=("hf", "gguf", "peft", "compressed-tensors", "gptq"),
        default="hf",
        help="hf: a directory that transformers loads; gguf: a file for llama.cpp, of Llama's family; peft: the "
        "adapter alone, of a fine-tuned model; compressed-tensors and gptq: the codes of a model that was compressed, "
        "in a directory that transformers and vLLM load (default: %(default)s).",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="Of a run: the newest weights, or those with the lowest held-out bits per byte (default: %(default)s).",
    )
    args = parser.parse_args(words)
    from cramjax.formats.directory import require_new
    from cramjax.training.given import language_model, load

    require_new(args.out)
    print(language_model(load(args.model, args.checkpoint)).export(args.out, args.format))
