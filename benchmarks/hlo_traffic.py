"""The kernels of a program that XLA compiled for a GPU, and the bytes that each reads and writes, from its text alone.

A kernel reads its operands and writes its results once, less what it never touches: of an operand that it only slices
or gathers from, it reads the slices; of a buffer that it updates in place, it writes the update. Caches are not
modelled, so a kernel that reads an operand twice counts it once. Used by `step_bytes.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

_NO_KERNEL = {"add-dependency", "after-all", "async-update", "bitcast", "constant", "get-tuple-element", "opt-barrier"}
_NO_KERNEL |= {"parameter", "partition-id", "replica-id", "tuple"}
# An operation inside a kernel that reads all of its operands, however little of its result is used.
_READS_ALL = {"convolution", "custom-call", "dot", "fusion", "map", "reduce", "reduce-window", "scatter", "sort"}
_NO_WORK = {"bitcast", "broadcast", "constant", "get-tuple-element", "iota", "parameter", "reshape", "tuple"}
_CONVERTS = {"bitcast-convert", "convert"}
_SLICES = {"dynamic-slice", "dynamic-update-slice", "slice"}
_CONCATENATES = {"concatenate", "pad"}
_MOVES = {"copy", "reverse", "transpose"} | _CONVERTS | _SLICES | _CONCATENATES
_EXPONENTIALS = {"erf", "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh"}


@dataclass(frozen=True)
class Shape:
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of one element; 0 of what is no data, such as a token."""
        if self.dtype == "pred":
            return 8
        digits = re.search(r"\d+", self.dtype)  # of f8e4m3fn the first
        return int(digits[0]) if digits else 0

    def bytes_of(self, elements: int) -> int:
        """Bytes of so many of its elements."""
        return elements * self.bits // 8

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.bytes_of(self.elements)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """The arrays of its result: several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """What follows the operands: called computations, metadata, backend configuration."""
    root: bool = False

    @property
    def elements(self) -> int:
        """Elements of all arrays of the result."""
        return sum(shape.elements for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program; empty where XLA does not say."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"')

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern's first match in the attributes; empty without one."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]
"""Instructions by name, each after its operands."""


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program, with all its runs."""

    name: str
    kind: str
    """`products`, `attention`, `kernel NAME` for one of ours, or what it does, such as `reductions`."""
    only: str | None
    """The verb of a kernel that computes nothing (`converts`, `slices`, `concatenates`, `copies`) or nothing but a tanh
    or an exponential (`takes a tanh of`); None for all others."""
    times: int
    """Runs in one run of the program."""
    read: int
    """Bytes a run."""
    written: int
    """Bytes a run."""
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    """Without a library's workspace."""
    op_name: str

    @property
    def bytes(self) -> int:
        """Bytes that all runs read and write."""
        return self.times * (self.read + self.written)

    @property
    def of_optimizer(self) -> bool:
        """Whether it updates parameters, by the scopes that the step names."""
        return _updates(self.op_name)


@dataclass(frozen=True)
class Traffic:
    """What a program runs."""

    kernels: tuple[Kernel, ...]
    endless: tuple[str, ...]
    """Loops of which the text does not say how often they turn: their kernels are counted for one turn."""


def parse(text: str) -> Module:
    """Read the text of an optimised HLO module.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: it has no entry computation, or a line of a computation is not understood.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.split("\n"):
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif line.strip():
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not that of a compiled HLO module")
    return Module(computations, entry)


def traffic(text: str) -> Traffic:
    """The kernels that one run of a compiled program launches, loops multiplied out.

    A conditional counts its largest branch; an asynchronous pair counts once.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: the text is not understood.
    """
    module = parse(text)
    endless: list[str] = []
    kernels = tuple(_kernels(module, module.entry, 1, endless))
    return Traffic(kernels, tuple(endless))


def _instruction(line: str) -> Instruction:
    """Read `  ROOT %name = type opcode(operands), attributes`."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        raise ValueError(f"a line of a computation is not an instruction: {line[:200]}")
    rest = line[head.end() :]
    # A tuple's type is in parentheses; an array's ends with its layout, in braces.
    end = _closing(rest, 0) if rest.startswith("(") else 0
    opcode = re.compile(r"(?:[^\s{(]*(?:\{[^}]*\})?)\s+([\w\-]+)(?=\()").match(rest, end)
    if not opcode:
        raise ValueError(f"an instruction has no opcode: {line[:200]}")
    start = opcode.end()
    close = _closing(rest, start)
    # Constants and parameters have no operands, but a literal or a number.
    inside = "" if opcode[1] in ("constant", "parameter") else rest[start + 1 : close - 1]
    return Instruction(
        name=head[2],
        shapes=_shapes(rest[: opcode.start(1)]),
        opcode=opcode[1],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[close:],
        root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple(Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for dtype, dims in found)


def _kernels(module: Module, name: str, times: int, endless: list[str]) -> Iterator[Kernel]:
    """The kernels of a computation that runs so many times."""
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in _NO_KERNEL or opcode.endswith("-done"):
            continue
        if opcode == "while":
            turns = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
            if not turns:
                endless.append(instruction.op_name or instruction.name)
            body = instruction.attribute(r"\bbody=%?([\w.\-]+)")
            yield from _kernels(module, body, times * int(turns or 1), endless)
        elif opcode == "conditional":
            branches = [list(_kernels(module, branch, times, endless)) for branch in _branches(instruction)]
            yield from max(branches, key=lambda branch: sum(kernel.bytes for kernel in branch))
        elif opcode in ("call", "async-start"):
            called = instruction.attribute(r"\b(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
            yield from _kernels(module, called, times, endless)
        else:
            yield _kernel(module, computation, _waited_for(computation, instruction), times)


def _waited_for(computation: Computation, instruction: Instruction) -> Instruction:
    """An asynchronous start as the instruction that it stands for, with what its end gives; others as they are."""
    if not instruction.opcode.endswith("-start"):
        return instruction
    end = instruction
    while not end.opcode.endswith("-done"):
        end = next(user for user in computation.values() if end.name in user.operands)
    return replace(instruction, opcode=instruction.opcode.removesuffix("-start"), shapes=end.shapes)


def _branches(conditional: Instruction) -> list[str]:
    listed = conditional.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return [name.strip().lstrip("%") for name in listed.split(",")]
    return [conditional.attribute(rf"{which}_computation=%?([\w.\-]+)") for which in ("true", "false")]


def _kernel(module: Module, computation: Computation, instruction: Instruction, times: int) -> Kernel:
    """One instruction that runs as a kernel."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = module.computations[instruction.attribute(r"\bcalls=%?([\w.\-]+)")]
    else:  # as a fusion of one
        body = {operand.name: replace(operand, opcode="parameter", operands=()) for operand in operands}
        body[instruction.name] = replace(instruction, root=True)
    work = list(_flat(module, body))
    called = next((i for i in work if i.opcode == "custom-call"), None)
    library = called is not None and _ours(called) is None
    results = called.shapes if called is not None and library else instruction.shapes
    if library:
        results = tuple(shape for shape in results if not _workspace(shape))
    root = next(i for i in body.values() if i.root)
    op_name = instruction.op_name or (called or root).op_name
    only = None if called else _only(work)
    return Kernel(
        name=instruction.name,
        kind=_kind(work, called, only, op_name),
        only=only,
        times=times,
        read=_read(module, body),
        written=_written(body, library),
        operands=tuple(shape for operand in operands for shape in operand.shapes),
        results=results,
        op_name=op_name,
    )


def _flat(module: Module, body: Computation) -> Iterator[Instruction]:
    """The instructions of a kernel, those of fusions within it included."""
    for instruction in body.values():
        if instruction.opcode == "fusion":
            yield from _flat(module, module.computations[instruction.attribute(r"\bcalls=%?([\w.\-]+)")])
        else:
            yield instruction


# What a kernel touches.


def _source(body: Computation, name: str, through: tuple[str, ...] = ("bitcast",)) -> Instruction:
    """What an instruction is, seen through those that leave it where it is."""
    instruction = body[name]
    while instruction.opcode in through:
        instruction = body[instruction.operands[0]]
    return instruction


def _outputs(body: Computation) -> list[Instruction]:
    """What a kernel writes: its root, or what its root's tuple joins, without bitcasts."""
    root = next(i for i in body.values() if i.root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    return [_source(body, name) for name in names]


def _in_place(body: Computation) -> set[str]:
    """The updates and scatters of a kernel whose result lies where the operand lay."""
    return {
        output.name
        for output in _outputs(body)
        if output.opcode in ("dynamic-update-slice", "scatter")
        and _source(body, output.operands[0]).opcode == "parameter"
    }


def _read(module: Module, body: Computation) -> int:
    """Bytes that a kernel reads: for each parameter, as many elements as its results need, from the results upwards."""
    in_place = _in_place(body)
    needed: Counter[str] = Counter()
    for output in _outputs(body):
        needed[output.name] = output.elements
    read = 0
    for instruction in reversed(body.values()):
        wanted = min(needed[instruction.name], instruction.elements)
        if instruction.opcode == "parameter":
            read += instruction.shapes[0].bytes_of(wanted) if instruction.shapes else 0
        elif wanted:
            for index, name in enumerate(instruction.operands):
                if instruction.name in in_place:
                    needed[name] += _needed_by_update(module, body, instruction, index)
                else:
                    needed[name] += _needed_by(body, instruction, index, wanted)
    return read


def _needed_by(body: Computation, instruction: Instruction, index: int, wanted: int) -> int:
    """Elements of an operand that so many elements of a result are computed from."""
    whole = body[instruction.operands[index]].elements
    indices = instruction.opcode == "gather" and index > 0
    return whole if indices or instruction.opcode in _READS_ALL else min(whole, wanted)


def _needed_by_update(module: Module, body: Computation, update: Instruction, index: int) -> int:
    """Elements of an operand that an update in place reads: of its buffer none, or the rows that a scatter combines."""
    whole = body[update.operands[index]].elements
    buffers = len(update.operands) // 2 if update.opcode == "scatter" else 1
    if index >= buffers:
        return whole
    if update.opcode == "dynamic-update-slice":
        return 0
    combine = module.computations[update.attribute(r"\bto_apply=%?([\w.\-]+)")]
    overwrites = next(i for i in combine.values() if i.root).opcode == "parameter"
    return 0 if overwrites else min(whole, body[update.operands[buffers + 1 + index]].elements)


def _written(body: Computation, library: bool) -> int:
    """Bytes that a kernel writes, a library's workspace left out."""
    in_place = _in_place(body)
    written = 0
    for output in _outputs(body):
        if output.name not in in_place:
            written += sum(shape.bytes for shape in output.shapes if not (library and _workspace(shape)))
            continue
        buffers = len(output.operands) // 2 if output.opcode == "scatter" else 1
        first = buffers + 1 if output.opcode == "scatter" else 1
        for shape, update in zip(output.shapes, output.operands[first : first + buffers], strict=True):
            written += shape.bytes_of(min(shape.elements, body[update].elements))
    return written


def _workspace(shape: Shape) -> bool:
    return shape.dtype in ("s8", "u8") and len(shape.dims) == 1


# What a kernel is for.


def _ours(call: Instruction) -> str | None:
    """The name of a kernel written in Pallas; None of a library's."""
    if not re.search(r'custom_call_target="[^"]*(triton|mosaic_gpu)', call.attributes):
        return None
    named = call.attribute(r'\bname = "([^"]+)"')
    return named or call.op_name.removesuffix("/pallas_call").rsplit("/", 1)[-1]


def _kind(work: list[Instruction], called: Instruction | None, only: str | None, op_name: str) -> str:
    opcodes = {instruction.opcode for instruction in work}
    if called is not None and (name := _ours(called)) is not None:
        return "attention" if name.startswith("attention") else f"kernel {name}"
    target = called.attribute(r'custom_call_target="([^"]*)"') if called else ""
    if "fmha" in target:
        return "attention"
    if re.search("cublas|gemm|matmul|cudnn", target) or opcodes & {"dot", "convolution"}:
        return "products"
    if _updates(op_name):
        return "optimizer"
    if opcodes & {"scatter", "sort"} or re.search("(?i)sort|topk", target):
        return "scatter and gather"
    if target:
        return "other"
    if only:
        return {"concatenates": "concatenations", "takes a tanh of": "tanh and exp"}.get(only, only)
    for kind, members in (
        ("reductions", {"reduce", "reduce-window"}),
        ("concatenations", _CONCATENATES),
        ("scatter and gather", {"gather"}),
        ("tanh and exp", _EXPONENTIALS),
        ("slices", _SLICES),
    ):
        if opcodes & members:
            return kind
    arithmetic = {i.opcode for i in work if i.elements > 1} - _NO_WORK - _MOVES
    if not arithmetic:
        return "fills"
    return "additions" if arithmetic <= {"add", "subtract"} else "other elementwise"


def _updates(op_name: str) -> bool:
    return re.search(r"/(optimizer|update)\b", op_name) is not None


def _only(work: list[Instruction]) -> str | None:
    """The verb of a kernel that only moves or converts arrays, or takes a tanh; scaling by one number is no work."""
    body = {instruction.name: instruction for instruction in work}
    opcodes = {i.opcode for i in work if i.elements > 1 and not _scales(body, i)} - _NO_WORK
    reads = any(i.opcode == "parameter" and i.elements > 1 for i in work)
    if not reads or not opcodes or not opcodes <= _MOVES | _EXPONENTIALS:
        return None
    for verb, members in (
        ("takes a tanh of", _EXPONENTIALS),
        ("concatenates", _CONCATENATES),
        ("slices", _SLICES),
        ("converts", _CONVERTS),
    ):
        if opcodes & members:
            return verb
    return "copies"


def _scales(body: Computation, instruction: Instruction) -> bool:
    """Whether an instruction multiplies or divides by a single number."""
    if instruction.opcode not in ("multiply", "divide"):
        return False
    through = ("bitcast", "broadcast", "convert", "reshape")
    return any(name in body and _source(body, name, through).elements == 1 for name in instruction.operands)
