"""The count of a step's bytes, on programs whose bytes are known by arithmetic."""

import pytest

from cramjax.planning import missing

needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


def _program(body: str, computations: str = "") -> str:
    return f"HloModule jit_f, is_scheduled=true\n\n{computations}\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"


_ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
_SECOND = """
%second (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}
"""


def _only_kernel(scripts, text: str):
    (kernel,) = scripts[0].traffic(text).kernels
    return kernel


# One fused computation each: its lines, the operands' types, the result's type, then bytes read, written, kind, verb.
FUSIONS = {
    "a convert": (
        ["%p = f32[1024,64]{1,0} parameter(0)", "ROOT %r = bf16[1024,64]{1,0} convert(%p)"],
        ["f32[1024,64]{1,0}"],
        "bf16[1024,64]{1,0}",
        (1024 * 64 * 4, 1024 * 64 * 2, "converts", "converts"),
    ),
    "a scaled convert": (
        [
            "%p = f32[1024,64]{1,0} parameter(0)",
            "%s = f32[] parameter(1)",
            "%b = f32[1024,64]{1,0} broadcast(%s), dimensions={}",
            "%m = f32[1024,64]{1,0} multiply(%p, %b)",
            "ROOT %r = bf16[1024,64]{1,0} convert(%m)",
        ],
        ["f32[1024,64]{1,0}", "f32[]"],
        "bf16[1024,64]{1,0}",
        (1024 * 64 * 4 + 4, 1024 * 64 * 2, "converts", "converts"),
    ),
    "a scale by row, which is work": (
        [
            "%p = bf16[1024,64]{1,0} parameter(0)",
            "%s = f32[1024]{0} parameter(1)",
            "%c = f32[1024,64]{1,0} convert(%p)",
            "%b = f32[1024,64]{1,0} broadcast(%s), dimensions={0}",
            "%m = f32[1024,64]{1,0} multiply(%c, %b)",
            "ROOT %r = bf16[1024,64]{1,0} convert(%m)",
        ],
        ["bf16[1024,64]{1,0}", "f32[1024]{0}"],
        "bf16[1024,64]{1,0}",
        (1024 * 64 * 2 + 1024 * 4, 1024 * 64 * 2, "other elementwise", None),
    ),
    "a slice, seen through a convert": (
        [
            "%p = f32[1024,192]{1,0} parameter(0)",
            "%c = bf16[1024,192]{1,0} convert(%p)",
            "ROOT %r = bf16[1024,64]{1,0} slice(%c), slice={[0:1024], [64:128]}",
        ],
        ["f32[1024,192]{1,0}"],
        "bf16[1024,64]{1,0}",
        (1024 * 64 * 4, 1024 * 64 * 2, "slices", "slices"),
    ),
    "two outputs of one slice each, one operand added whole": (
        [
            "%p = f32[128,8]{1,0} parameter(0)",
            "%q = f32[128,4]{1,0} parameter(1)",
            "%s = f32[128,4]{1,0} slice(%p), slice={[0:128], [0:4]}",
            "%t = f32[128,2]{1,0} slice(%p), slice={[0:128], [4:6]}",
            "%u = f32[128,4]{1,0} add(%s, %q)",
            "ROOT %r = (f32[128,4]{1,0}, f32[128,2]{1,0}) tuple(%u, %t)",
        ],
        ["f32[128,8]{1,0}", "f32[128,4]{1,0}"],
        "(f32[128,4]{1,0}, f32[128,2]{1,0})",
        (128 * (4 + 2 + 4) * 4, 128 * (4 + 2) * 4, "slices", None),
    ),
    "a dynamic slice": (
        [
            "%p = bf16[12,1024,64]{2,1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            "%z = s32[] constant(0)",
            "%d = bf16[1,1024,64]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,1024,64}",
            "ROOT %r = bf16[1024,64]{1,0} bitcast(%d)",
        ],
        ["bf16[12,1024,64]{2,1,0}", "s32[]"],
        "bf16[1024,64]{1,0}",
        (1024 * 64 * 2 + 4, 1024 * 64 * 2, "slices", "slices"),
    ),
    "an update in place": (
        [
            "%p = bf16[12,1024,64]{2,1,0} parameter(0)",
            "%u = f32[1024,64]{1,0} parameter(1)",
            "%i = s32[] parameter(2)",
            "%z = s32[] constant(0)",
            "%c = bf16[1024,64]{1,0} convert(%u)",
            "%b = bf16[1,1024,64]{2,1,0} bitcast(%c)",
            "ROOT %r = bf16[12,1024,64]{2,1,0} dynamic-update-slice(%p, %b, %i, %z, /*index=4*/%z)",
        ],
        ["bf16[12,1024,64]{2,1,0}", "f32[1024,64]{1,0}", "s32[]"],
        "bf16[12,1024,64]{2,1,0}",
        (1024 * 64 * 4 + 4, 1024 * 64 * 2, "slices", "slices"),
    ),
    "an update in place of what was there": (
        [
            "%p = f32[12,64]{1,0} parameter(0)",
            "%u = f32[1,64]{1,0} parameter(1)",
            "%i = s32[] parameter(2)",
            "%z = s32[] constant(0)",
            "%d = f32[1,64]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}",
            "%a = f32[1,64]{1,0} add(%d, %u)",
            "ROOT %r = f32[12,64]{1,0} dynamic-update-slice(%p, %a, %i, %z)",
        ],
        ["f32[12,64]{1,0}", "f32[1,64]{1,0}", "s32[]"],
        "f32[12,64]{1,0}",
        (2 * 64 * 4 + 4, 64 * 4, "slices", None),
    ),
    "an update of a new buffer, written whole": (
        [
            "%u = f32[1,64]{1,0} parameter(0)",
            "%i = s32[] parameter(1)",
            "%z = s32[] constant(0)",
            "%f = f32[] constant(0)",
            "%b = f32[12,64]{1,0} broadcast(%f), dimensions={}",
            "ROOT %r = f32[12,64]{1,0} dynamic-update-slice(%b, %u, %i, %z)",
        ],
        ["f32[1,64]{1,0}", "s32[]"],
        "f32[12,64]{1,0}",
        (64 * 4 + 4, 12 * 64 * 4, "slices", "slices"),
    ),
    "a gather of rows": (
        [
            "%p = f32[50304,64]{1,0} parameter(0)",
            "%i = s32[1024,1]{1,0} parameter(1)",
            "ROOT %r = f32[1024,64]{1,0} gather(%p, %i), offset_dims={1}, slice_sizes={1,64}",
        ],
        ["f32[50304,64]{1,0}", "s32[1024,1]{1,0}"],
        "f32[1024,64]{1,0}",
        (1024 * 64 * 4 + 1024 * 4, 1024 * 64 * 4, "scatter and gather", None),
    ),
    "rows added in place": (
        [
            "%p = f32[50304,64]{1,0} parameter(0)",
            "%i = s32[1024,1]{1,0} parameter(1)",
            "%u = bf16[1024,1,64]{2,1,0} parameter(2)",
            "%c = f32[1024,1,64]{2,1,0} convert(%u)",
            "ROOT %r = f32[50304,64]{1,0} scatter(%p, %i, %c), update_window_dims={1,2}, to_apply=%add",
        ],
        ["f32[50304,64]{1,0}", "s32[1024,1]{1,0}", "bf16[1024,1,64]{2,1,0}"],
        "f32[50304,64]{1,0}",
        (1024 * 64 * (4 + 2) + 1024 * 4, 1024 * 64 * 4, "scatter and gather", None),
    ),
    "rows overwritten in place": (
        [
            "%p = f32[50304,64]{1,0} parameter(0)",
            "%i = s32[1024,1]{1,0} parameter(1)",
            "%u = f32[1024,1,64]{2,1,0} parameter(2)",
            "ROOT %r = f32[50304,64]{1,0} scatter(%p, %i, %u), update_window_dims={1,2}, to_apply=%second",
        ],
        ["f32[50304,64]{1,0}", "s32[1024,1]{1,0}", "f32[1024,1,64]{2,1,0}"],
        "f32[50304,64]{1,0}",
        (1024 * 64 * 4 + 1024 * 4, 1024 * 64 * 4, "scatter and gather", None),
    ),
    "a sum of slices of rows": (
        [
            "%p = f32[1024,128]{1,0} parameter(0)",
            "%z = f32[] constant(0)",
            "%s = f32[1024,64]{1,0} slice(%p), slice={[0:1024], [0:64]}",
            "ROOT %r = f32[1024]{0} reduce(%s, %z), dimensions={1}, to_apply=%add",
        ],
        ["f32[1024,128]{1,0}"],
        "f32[1024]{0}",
        (1024 * 64 * 4, 1024 * 4, "reductions", None),
    ),
    "a tanh": (
        [
            "%p = f32[1024,512]{1,0} parameter(0)",
            "%c = f32[] constant(0.0666)",
            "%b = f32[1024,512]{1,0} broadcast(%c), dimensions={}",
            "%m = f32[1024,512]{1,0} multiply(%p, %b)",
            "ROOT %r = f32[1024,512]{1,0} tanh(%m)",
        ],
        ["f32[1024,512]{1,0}"],
        "f32[1024,512]{1,0}",
        (1024 * 512 * 4, 1024 * 512 * 4, "tanh and exp", "takes a tanh of"),
    ),
    "a concatenation": (
        [
            "%p = bf16[1024,64]{1,0} parameter(0)",
            "%q = bf16[1024,32]{1,0} parameter(1)",
            "ROOT %r = bf16[1024,96]{1,0} concatenate(%p, %q), dimensions={1}",
        ],
        ["bf16[1024,64]{1,0}", "bf16[1024,32]{1,0}"],
        "bf16[1024,96]{1,0}",
        (1024 * 96 * 2, 1024 * 96 * 2, "concatenations", "concatenates"),
    ),
    "zeros": (
        ["%z = bf16[] constant(0)", "ROOT %r = bf16[16,64]{1,0} broadcast(%z), dimensions={}"],
        [],
        "bf16[16,64]{1,0}",
        (0, 16 * 64 * 2, "fills", None),
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fusion_counts_what_it_touches(scripts, name: str, asynchronous: bool) -> None:
    lines, operands, result, expected = FUSIONS[name]
    fused = "%fused (p: f32[]) -> f32[] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"
    body = [f"  %x{n} = {operand} parameter({n})" for n, operand in enumerate(operands)]
    names = ", ".join(f"%x{n}" for n in range(len(operands)))
    if asynchronous:
        types = f"(({', '.join(operands)}), {result}, u32[])"
        body.append(f"  %s = {types} fusion-start({names}), kind=kLoop, calls=%fused")
        body.append(f"  ROOT %d = {result} fusion-done(%s)")
    else:
        body.append(f"  ROOT %f = {result} fusion({names}), kind=kLoop, calls=%fused")
    kernel = _only_kernel(scripts, _program("\n".join(body), _ADD + _SECOND + fused))
    assert (kernel.read, kernel.written, kernel.kind, kernel.only) == expected


def test_an_operation_alone_counts_as_a_fusion_of_one(scripts) -> None:
    copy = "  %x = f32[64,32]{1,0} parameter(0)\n  ROOT %c = f32[64,32]{0,1:T(8,128)} copy(f32[64,32]{1,0} %x)"
    kernel = _only_kernel(scripts, _program(copy))
    assert (kernel.read, kernel.written, kernel.kind, kernel.only) == (8192, 8192, "copies", "copies")
    pair = (
        "  %x = f32[64,32]{1,0} parameter(0)\n"
        "  %c = (f32[64,32]{1,0:S(5)}, f32[64,32]{1,0}, u32[]) copy-start(%x)\n"
        "  ROOT %d = f32[64,32]{1,0:S(5)} copy-done(%c)"
    )
    kernel = _only_kernel(scripts, _program(pair))
    assert (kernel.read, kernel.written, kernel.kind) == (8192, 8192, "copies")


def test_an_asynchronous_computation_counts_once(scripts) -> None:
    body = (
        "  %x = f32[256]{0} parameter(0)\n"
        "  %s = ((f32[256]{0}), f32[256]{0}, u32[]) async-start(%x), calls=%negated\n"
        "  %u = ((f32[256]{0}), f32[256]{0}, u32[]) async-update(%s)\n"
        "  ROOT %d = f32[256]{0} async-done(%u)"
    )
    negated = (
        "%negated (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n  ROOT %n = f32[256]{0} negate(%x)\n}\n"
    )
    kernel = _only_kernel(scripts, _program(body, negated))
    assert (kernel.read, kernel.written, kernel.kind) == (1024, 1024, "other elementwise")


def test_a_gemm_is_a_product_without_its_workspace(scripts) -> None:
    gemm = (
        "  %x = bf16[1024,64]{1,0} parameter(0)\n"
        "  %w = bf16[64,256]{1,0} parameter(1)\n"
        "  ROOT %g = (f32[1024,256]{1,0}, s8[33554432]{0}) custom-call(%x, %w), "
        'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/mlp/dot_general"}, '
        'backend_config={"gemm_backend_config":{"beta":0,"epilogue":"DEFAULT"}}'
    )
    kernel = _only_kernel(scripts, _program(gemm))
    assert (kernel.kind, kernel.only, kernel.op_name) == ("products", None, "jit(step)/mlp/dot_general")
    assert [str(shape) for shape in kernel.results] == ["f32[1024,256]"]
    assert (kernel.read, kernel.written) == ((1024 * 64 + 64 * 256) * 2, 1024 * 256 * 4)


def test_a_gemm_of_one_layer_reads_that_layer(scripts) -> None:
    fused = """
%dsf (p: bf16[12,64,256], q: bf16[1024,64]) -> (bf16[1024,256], s8[4194304]) {
  %q = bf16[1024,64]{1,0} parameter(1)
  %p = bf16[12,64,256]{2,1,0} parameter(0)
  %s = bf16[1,64,256]{2,1,0} slice(%p), slice={[3:4], [0:64], [0:256]}
  %b = bf16[64,256]{1,0} bitcast(%s)
  ROOT %g = (bf16[1024,256]{1,0}, s8[4194304]{0}) custom-call(%q, %b), custom_call_target="__cublas$gemm"
}
"""
    body = (
        "  %w = bf16[12,64,256]{2,1,0} parameter(0)\n  %x = bf16[1024,64]{1,0} parameter(1)\n"
        "  ROOT %f = (bf16[1024,256]{1,0}, s8[4194304]{0}) fusion(%w, %x), kind=kCustom, calls=%dsf"
    )
    kernel = _only_kernel(scripts, _program(body, fused))
    assert kernel.kind == "products"
    assert (kernel.read, kernel.written) == ((1024 * 64 + 64 * 256) * 2, 1024 * 256 * 2)


@pytest.mark.parametrize(
    ("target", "name", "kind"),
    [
        ("__gpu$xla.gpu.triton", "attention_dkv", "attention"),
        ("__gpu$xla.gpu.triton", "rms_norm_backward", "kernel rms_norm_backward"),
        ("__cudnn$fmhaSoftmaxBackward", "", "attention"),
    ],
)
def test_kernels_written_by_hand_go_by_their_names(scripts, target: str, name: str, kind: str) -> None:
    # An operand that the result lies on is read and written.
    call = (
        "  %x = bf16[1024,64]{1,0} parameter(0)\n  %y = f32[1024]{0} parameter(1)\n"
        f'  ROOT %c = bf16[1024,64]{{1,0}} custom-call(%x, %y), custom_call_target="{target}", '
        "output_to_operand_aliasing={{}: (0, {})}, "
        'metadata={op_name="jit(step)/layer/rows/pallas_call"}, '
        f'backend_config={{debug = false, grid_x = 8 : i32, ir = "ML\\EFR(\\0D\\22", name = "{name}", num_warps = 4}}'
    )
    kernel = _only_kernel(scripts, _program(call))
    assert (kernel.kind, kernel.read, kernel.written) == (kind, 1024 * 64 * 2 + 1024 * 4, 1024 * 64 * 2)


_LOOP = """
%body (t: (s32[], f32[256])) -> (s32[], f32[256]) {
  %t = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[256]{0} get-tuple-element(%t), index=1
  %n = f32[256]{0} negate(%v)
  ROOT %r = (s32[], f32[256]{0}) tuple(%i, %n)
}

%condition (t: (s32[], f32[256])) -> pred[] {
  %t = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %k = s32[] constant(7)
  ROOT %l = pred[] compare(%i, %k), direction=LT
}
"""


@pytest.mark.parametrize(("known", "times"), [(', backend_config={"known_trip_count":{"n":"7"}}', 7), ("", 1)])
def test_a_loop_counts_its_turns(scripts, known: str, times: int) -> None:
    body = (
        "  %t = (s32[], f32[256]{0}) parameter(0)\n"
        "  ROOT %w = (s32[], f32[256]{0}) while(%t), condition=%condition, body=%body, "
        f'metadata={{op_name="jit(step)/while"}}{known}'
    )
    step = scripts[0].traffic(_program(body, _LOOP))
    (kernel,) = step.kernels
    assert (kernel.times, kernel.bytes) == (times, times * 2 * 256 * 4)
    assert step.endless == (() if known else ("jit(step)/while",))


@pytest.mark.parametrize(
    "form", ["branch_computations={%small, %large}", "true_computation=%small, false_computation=%large"]
)
def test_a_conditional_counts_its_largest_branch(scripts, form: str) -> None:
    branches = "".join(
        f"%{name} (x: f32[{n}]) -> f32[8] {{\n  %x = f32[{n}]{{0}} parameter(0)\n"
        f"  ROOT %s = f32[8]{{0}} slice(%x), slice={{[0:8]}}\n}}\n\n%more{name} (x: f32[8]) -> f32[8] {{\n"
        f"  %x = f32[8]{{0}} parameter(0)\n  ROOT %n = f32[8]{{0}} negate(%x)\n}}\n\n"
        for name, n in (("small", 8), ("other", 64))
    )
    large = (
        "%large (x: f32[64]) -> f32[8] {\n  %x = f32[64]{0} parameter(0)\n  %n = f32[64]{0} negate(%x)\n"
        "  %c = f32[8]{0} call(%n), to_apply=%other\n  ROOT %m = f32[8]{0} call(%c), to_apply=%moresmall\n}\n"
    )
    body = (
        "  %p = s32[] parameter(0)\n  %x = f32[8]{0} parameter(1)\n  %y = f32[64]{0} parameter(2)\n"
        f"  ROOT %c = f32[8]{{0}} conditional(%p, %x, %y), {form}"
    )
    step = scripts[0].traffic(_program(body, branches + large))
    assert sum(kernel.bytes for kernel in step.kernels) == 4 * (2 * 64 + 2 * 8 + 2 * 8)


def test_text_that_is_no_program_is_refused(scripts) -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        scripts[0].traffic("module @jit_step {\n}\n")


# tokens 128 of width 16 in a vocabulary of 512; weights of 16 × 64, two layers.
def _report(scripts, *kernels):
    hlo, script = scripts
    sizes = script.Sizes(tokens=128, width=16, vocab=512, weights=frozenset({16 * 64, 2 * 16 * 64, 512 * 16}))
    made = []
    for kind, only, op_name, operand, result in kernels:
        (x,), (y,) = hlo._shapes(operand), hlo._shapes(result)
        made.append(hlo.Kernel("k.1", kind, only, 3, x.bytes, y.bytes, (x,), (y,), op_name))
    return script.report(hlo.Traffic(tuple(made), ()), sizes)


@pytest.mark.parametrize(
    ("kernel", "rule"),
    [
        (("converts", "converts", "mlp", "f32[4,32,16]", "bf16[4,32,16]"), "a kernel that only converts activations"),
        (("slices", "slices", "mlp", "bf16[128,48]", "bf16[128,16]"), "a kernel that only slices activations"),
        (("tanh and exp", "takes a tanh of", "head", "f32[64,512]", "f32[64,512]"), "only takes a tanh of activations"),
        (("converts", "converts", "mlp", "f32[2,16,64]", "bf16[2,16,64]"), None),  # weights
        (("converts", "converts", "mlp", "f32[512,16]", "bf16[512,16]"), None),  # the embedding
        (("converts", "converts", "norm", "f32[128,1]", "bf16[128,1]"), None),  # a number a row
        (("other elementwise", None, "mlp", "bf16[128,64]", "bf16[128,64]"), None),
        (("products", None, "mlp/dot", "bf16[128,64]", "f32[128,16]"), "a product with a float32 result"),
        (("products", None, "loss/dot", "bf16[64,512]", "f32[64,16]"), None),  # as large as a layer's weight
        (("products", None, "mlp/dot", "bf16[128,64]", "bf16[128,16]"), None),
        (("products", None, "mlp/dot", "bf16[128,64]", "f32[64,16]"), None),  # a weight's gradient, transposed
        (("products", None, "step/optimizer/dot", "bf16[16,64]", "f32[16,16]"), None),
    ],
)
def test_rules(scripts, kernel: tuple, rule: str | None) -> None:
    breaches = _report(scripts, kernel).breaches
    assert (rule is None) == (not breaches)
    assert all(rule in breach.rule and breach.kernels.runs == 3 for breach in breaches)


def test_a_report_keeps_products_and_attention_apart(scripts) -> None:
    result = _report(
        scripts,
        ("products", None, "jit/layer_0/dot", "bf16[128,64]", "bf16[128,16]"),
        ("products", None, "jit/cross_entropy/dot", "bf16[128,16]", "f32[128,512]"),
        ("attention", None, "jit/layer_0/attention", "bf16[128,16]", "bf16[128,16]"),
        ("additions", None, "jit/layer_0/add", "bf16[128,16]", "bf16[128,16]"),
        ("additions", None, "jit/layer_1/add", "bf16[128,16]", "bf16[128,16]"),
    )
    each = 2 * 128 * 16 * 2
    assert (
        result.kinds == {"additions": pytest.approx(6 * each / 1e9)} and result.gigabytes == result.kinds["additions"]
    )
    assert result.attention_gigabytes == pytest.approx(3 * each / 1e9)
    assert result.products == {"bf16[128,16]": 3, "f32[128,512]": 3}
    assert not result.breaches and [row.runs for row in result.float32_logits] == [3]
    (row,) = result.largest  # of both layers
    assert (row.runs, row.kernel, row.op_name) == (6, "k", "jit/layer_*/add")
