"""What a compiled program moves: its collectives and its memory traffic, read from its text.

XLA's own cost analysis counts the body of a loop once, and the layers are a loop. So this module walks the text and
counts the body of every loop as often as the loop runs it. Of the branches of a conditional, of which a step runs one,
it counts the one that moves most (of a FlexiViT's patch sizes, the smallest).
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vit_scaling import UserError

# How libtpu lowers a collective between slices: the device hands its part to the host, and receives the result.
MEGASCALE = "xla_megascale_runtime"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

# Bytes of the element types that a step uses; a type that is not here counts as 4.
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
# Names and views of data that stays where it is, and instructions whose work is counted inside them.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_FREE |= {"async", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "broadcast"}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Collective(NamedTuple):
    """One collective instruction, as often as its loops run it."""

    kind: str
    times: int  # that a step runs it
    payload: float  # bytes of its result on one device, each time
    group: int  # devices that take part together
    ici: float  # bytes that one device must receive over ICI or NVLink, each time, by the best algorithm
    dcn: float  # and over DCN; what enters a slice is shared among the devices of the group in it


class Traffic(NamedTuple):
    """What one device moves in one step."""

    collectives: tuple[Collective, ...]
    memory_bytes: float  # read from and written to the device's memory, about


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    text: str
    root: bool


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.root)


def traffic(text: str, slices: np.ndarray | None = None) -> Traffic:
    """Returns what a compiled program moves.

    Args:
        text: the optimised program, `compiled.as_text()`.
        slices: [devices] the slice, or the node, of each device in the mesh's flat order; None for one.

    Raises:
        UserError: the text is no program.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise UserError("the text holds no entry computation; give compiled.as_text()")
    collectives: list[Collective] = []
    walked = list(_walk(computations, entry))
    for instruction, _, times, _ in walked:
        if instruction.opcode in KINDS:
            collectives.append(_collective(instruction, times, slices))
        elif instruction.opcode == "recv" and MEGASCALE in instruction.text:
            collectives.append(_between_slices(instruction, times, slices))
    return Traffic(tuple(c for c in collectives if c.group > 1 and c.payload), _moved(walked, computations))


# ---- the text --------------------------------------------------------------------------------------------------------


def attention(text: str) -> str:
    """Returns how a compiled program computes attention: by which hand-written kernels, or as XLA's own operations."""
    calls = [line for line in text.splitlines() if "custom-call(" in line]
    kernels = {
        "__cudnn$fmha": "cuDNN's fused attention",
        "flash_attention": "flash attention (Pallas)",
        "self_attention": "short attention (Pallas)",
        "window_attention": "window attention (Pallas)",
        "layer_norm": None,
        "pallas_call": "local attention (Pallas)",
    }
    found = {next((kernels[mark] for mark in kernels if mark in call), None) for call in calls}
    return ", ".join(name for name in kernels.values() if name in found and name is not None) or "XLA operations"


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = header[2]
                computations[current] = _Computation({})
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            shape, rest = _split_shape(match[3])
            opcode, _, arguments = rest.partition("(")
            inside = arguments[: _closing("(" + arguments) - 1]
            operands = tuple(_NAME.findall(inside))
            opcode, shape = _started(opcode.strip(), shape)
            instruction = _Instruction(match[2], opcode, shape, operands, rest, bool(match[1]))
            computations[current].instructions[match[2]] = instruction
    return computations, entry


def _started(opcode: str, shape: str) -> tuple[str, str]:
    """Returns an instruction that is split into start and done as the whole of it, at its start."""
    name = opcode.removesuffix("-start")
    if name == opcode or name == "async" or not shape.startswith("("):
        return name, shape
    elements = _elements(shape)
    if elements[0].startswith("("):  # what goes in, what comes out, signals
        return name, elements[1]
    if name == "all-reduce":  # what comes out
        return name, shape
    return name, elements[0 if name == "copy" else 1]


def _closing(text: str) -> int:
    """Returns the position of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text)


def _split_shape(text: str) -> tuple[str, str]:
    """Splits `SHAPE opcode(...)...`; the shape of a tuple holds spaces and parentheses."""
    if text.startswith("("):
        end = _closing(text) + 1
        return text[:end], text[end:].strip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _elements(shape: str) -> list[str]:
    """Splits the shape of a tuple into those of its elements, which may be tuples."""
    found, rest = [], shape[1:-1].strip()
    while rest:
        rest = re.sub(r"^/\*[^*]*\*/", "", rest)
        end = _closing(rest) + 1 if rest.startswith("(") else _ARRAY.match(rest).end()  # type: ignore[union-attr]
        found.append(rest[:end])
        rest = rest[end:].lstrip(", ")
    return found


def _bytes(shape: str) -> float:
    """Returns the bytes of an array or a tuple, less what lies in another memory than the device's main one."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(shape):
        if not re.search(r"S\([1-9]\d*\)", layout):
            total += math.prod(int(d) for d in dims.split(",") if d) * _SIZES.get(kind, 4)
    return total


def _attribute(instruction: _Instruction, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.text)
    return match[1] if match else None


# ---- the walk --------------------------------------------------------------------------------------------------------


_Walked = tuple[_Instruction, _Computation, int, bool]


def _walk(computations: dict[str, _Computation], name: str, times: int = 1, fused: bool = False) -> Iterator[_Walked]:
    """Yields (instruction, its computation, how often it runs, whether it is part of a fusion)."""
    computation = computations[name]
    for instruction in computation.instructions.values():
        yield instruction, computation, times, fused
        if instruction.opcode == "while":
            body, condition = _attribute(instruction, "body"), _attribute(instruction, "condition")
            assert body is not None
            assert condition is not None
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
            trips = int(known[1]) if known else _trips(computations[condition], computations[body])
            yield from _walk(computations, body, times * trips, fused)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            names = _NAME.findall(branches[1]) if branches else []
            names = names or re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.text)
            branches_walked = [list(_walk(computations, branch, times, fused)) for branch in names]
            yield from max(branches_walked, key=lambda walked: _moved(walked, computations), default=[])
        else:
            inner = _attribute(instruction, "calls")
            if inner is None and instruction.opcode == "call":
                inner = _attribute(instruction, "to_apply")
            if inner in computations:
                yield from _walk(computations, str(inner), times, fused or instruction.opcode == "fusion")


def _trips(condition: _Computation, body: _Computation) -> int:
    """Returns how often a loop that counts from 0 up to a constant runs; 1 where it is no such loop."""
    test = condition.root
    if test.opcode != "compare":  # fused: the limit is the one constant there is
        limits = [_constant(i) for i in condition.instructions.values() if i.opcode == "constant"]
        return max((limit for limit in limits if limit is not None), default=1)
    counter = condition.instructions.get(test.operands[0])
    limit_of = condition.instructions.get(test.operands[1])
    limit = None if limit_of is None else _constant(limit_of)
    if counter is None or limit is None:
        return 1
    index = re.search(r"index=(\d+)", counter.text)
    return -(-limit // _increment(body, int(index[1]) if index else 0))


def _increment(body: _Computation, index: int) -> int:
    """Returns what a loop adds to its counter, element `index` of what it carries; 1 where that is not to be seen."""
    operands = body.root.operands
    addition = body.instructions.get(operands[index]) if index < len(operands) else None
    while addition is not None and addition.opcode in ("copy", "bitcast"):
        addition = body.instructions.get(addition.operands[0])
    if addition is None or addition.opcode != "add":
        return 1
    terms = (body.instructions.get(name) for name in addition.operands)
    constants = [value for value in (_constant(term) for term in terms if term is not None) if value]
    return constants[0] if constants else 1


def _constant(instruction: _Instruction) -> int | None:
    match = re.match(r"constant\((-?\d+)\)", instruction.text)
    return int(match[1]) if match else None


# ---- collectives -----------------------------------------------------------------------------------------------------


def _collective(instruction: _Instruction, times: int, slices: np.ndarray | None) -> Collective:
    kind = instruction.opcode
    payload = _bytes(instruction.shape)
    group = _groups(instruction)
    size = 2 if kind == "collective-permute" else len(group) if group is not None else 2
    count = 1 if slices is None or group is None else len(set(slices[group]))
    every = _received(kind, payload, size)
    # A slice as one device: it gets what several devices of the group get, over the networks of all of them.
    together = size // count
    dcn = _received(kind, payload * (together if kind == "reduce-scatter" else 1), count) / together
    return Collective(kind, times, payload, size, ici=every - dcn, dcn=dcn)


def _between_slices(instruction: _Instruction, times: int, slices: np.ndarray | None) -> Collective:
    """Returns the collective between slices whose result a `recv` of libtpu's megascale runtime delivers."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    count = 2 if slices is None else len(set(slices))
    payload = _bytes(_elements(instruction.shape)[0])  # then a context and a token
    name = kind[1].lower().replace("_", "-") if kind else "recv"
    return Collective(name, times, payload, count, ici=0.0, dcn=_received(name, payload, count))


def _received(kind: str, payload: float, size: int) -> float:
    """Returns the bytes that each of `size` devices receives for a result of `payload` bytes."""
    if size == 1:
        return 0.0
    if kind == "collective-permute":
        return payload
    if kind == "reduce-scatter":
        return payload * (size - 1)
    passes = 2 if kind == "all-reduce" else 1  # scattered sums, gathered again
    return passes * payload * (size - 1) / size


def _groups(instruction: _Instruction) -> np.ndarray | None:
    """Returns the devices, by their place in the mesh, of one group that communicates; None where it names none."""
    text = instruction.text
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}(?:,\{(\d+),(\d+)\})*", text):
        return np.asarray([int(pairs[1]), int(pairs[2])])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.asarray([int(device) for device in explicit[1].split(",")])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else range(len(dims))
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(tuple(order))
        return grid.reshape(int(iota[1]), int(iota[2]))[0]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        named = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[2]) if name in sizes]
        rest = [axis for axis in range(grid.ndim) if axis not in named]
        count = math.prod(grid.shape[axis] for axis in named)
        return grid.transpose(rest + named).reshape(-1, count)[0]
    return None


# ---- memory ----------------------------------------------------------------------------------------------------------


def _moved(walked: Iterable[_Walked], computations: dict[str, _Computation]) -> float:
    """Returns the bytes that instructions read and write, as often as they run."""
    return sum(times * _memory(i, inside, computations) for i, inside, times, fused in walked if not fused)


def _memory(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
    """Returns the bytes that one instruction reads and writes: operands and result, of slices only what is sliced."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1].shape) if len(operands) > 1 else 0.0
    if instruction.opcode != "fusion":
        return _bytes(instruction.shape) + sum(_bytes(operand.shape) for operand in operands)
    inner = computations[str(_attribute(instruction, "calls"))]
    reads = sum(_touched(inner, number, _bytes(o.shape), computations) for number, o in enumerate(operands))
    return reads + max(0.0, _bytes(instruction.shape) - _kept(inner, computations))


def _touched(inner: _Computation, number: int, whole: float, computations: dict[str, _Computation]) -> float:
    """Returns the bytes that a fusion reads of operand `number`: of one that it only slices, the slices."""
    named = (i for i in inner.instructions.values() if re.match(rf"parameter\({number}\)", i.text))
    names = [i.name for i in named]
    total = 0.0
    while names:
        name = names.pop()
        for user in inner.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _bytes(user.shape)
            elif user.opcode == "fusion":
                nested = computations[str(_attribute(user, "calls"))]
                total += _touched(nested, user.operands.index(name), whole, computations)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return whole  # all of it is read; what is updated in place is not
    return min(total, whole)


def _kept(inner: _Computation, computations: dict[str, _Computation]) -> float:
    """Returns the bytes of a fusion's result that it leaves as they were, updating a piece of them in place."""
    total = 0.0
    for i in inner.instructions.values():
        if i.opcode == "dynamic-update-slice" and i.operands[1] in inner.instructions:
            total += _bytes(i.shape) - _bytes(inner.instructions[i.operands[1]].shape)
        elif i.opcode == "fusion":
            total += _kept(computations[str(_attribute(i, "calls"))], computations)
    return total
