"""`cramjax import` and `cramjax export`: models of others as ours, and ours as those of others."""

from collections.abc import Sequence

from cramjax.commands.common import Parser


def import_(words: Sequence[str]) -> None:
    """Make a model directory of another library's model."""
    parser = Parser(
        prog="cramjax import",
        description="Make a model directory of another library's model: GPT-2, Llama (SmolLM2), Mistral, Mixtral, Qwen "
        "2 and 3 (with experts too), SmolLM3, Gemma 2 and 3 (text), NanoChat, BERT, RoBERTa, ModernBERT. `cramjax "
        "generate`, `fill-mask`, `evaluate` and `plan` take it as they take a run.",
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
    parser.add_argument(
        "--codes",
        action="store_true",
        help="Keep the codes of quantised matrices where a model of ours can hold them (GGUF's Q8_0, Q4_0 and Q4_1; "
        "GPTQ and compressed-tensors). Without, and of other kinds, weights become floating point numbers.",
    )
    args = parser.parse_args(words)
    from cramjax.language_model import import_model

    imported = import_model(args.source, args.out, dtype=args.dtype, codes=args.codes)
    codes = f", codes {imported.origin['codes']}" if args.codes else ""
    print(f"{imported.path}: {imported.origin['family']}, {imported.parameters:,} parameters, {imported.kind}{codes}")


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
        help="hf: a directory that transformers loads; gguf: a file for llama.cpp, of Llama's family, with the codes "
        "of a model that was compressed, their scales rounded to float16; peft: the adapter alone, of a fine-tuned "
        "model; compressed-tensors and gptq: codes in a directory that transformers and vLLM load (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--dequantise",
        action="store_true",
        help="Write the matrices of a compressed model as floating point numbers (hf and gguf).",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="Of a run: the newest weights, or those with the lowest held-out bits per byte (default: %(default)s).",
    )
    args = parser.parse_args(words)
    import jax

    from cramjax.formats.directory import require_new
    from cramjax.kernels.packed import Quantised, is_packed
    from cramjax.training.given import language_model, load

    require_new(args.out)
    model = language_model(load(args.model, args.checkpoint))
    print(model.export(args.out, args.format, dequantise=args.dequantise))
    leaves = jax.tree.leaves(model.params, is_leaf=is_packed)
    if any(isinstance(leaf, Quantised) and leaf.rounds for leaf in leaves):
        print("Its activations are of 8 bits here; there, what runs the model decides that.")
