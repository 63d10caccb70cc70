"""What a compiled program moves: its collectives and its traffic with memory, read from its text.

XLA's own cost analysis counts the body of a loop once, and the layers are a loop; so the text is walked here, every
loop's body as often as the loop runs it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

# Bytes of the element types that a step uses; a type that is not here counts as 4.
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
# Names and views of data that stays where it is, and instructions whose work is counted inside them.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "iota", "broadcast"}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Collective(NamedTuple):
    """One collective instruction, as often as its loops run it."""

    kind: str
    times: int  # that a step runs it
    payload: float  # bytes of its result on one device, each time
    wire: float  # bytes that one device must receive, each time, by the best algorithm
    group: int  # devices that take part together
    across: bool  # whether a group has devices of several slices


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
        slices: [devices] the slice of each device in the mesh's flat order; None for one slice.

    Raises:
        ValueError: the text is no program.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("the text holds no entry computation; give compiled.as_text()")
    collectives: list[Collective] = []
    memory = 0.0
    for instruction, computation, times, fused in _walk(computations, entry):
        kind = _kind(instruction)
        if kind is not None:
            collectives.append(_collective(instruction, kind, times, slices))
        if not fused:
            memory += times * _memory(instruction, computation, computations)
    return Traffic(tuple(c for c in collectives if c.group > 1 and c.payload), memory)


# ---- the text --------------------------------------------------------------------------------------------------------


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
            instruction = _Instruction(match[2], opcode.strip(), shape, operands, rest, bool(match[1]))
            computations[current].instructions[match[2]] = instruction
    return computations, entry


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


def _walk(
    computations: dict[str, _Computation], name: str, times: int = 1, fused: bool = False
) -> Iterator[tuple[_Instruction, _Computation, int, bool]]:
    """Yields (instruction, its computation, how often it runs, whether it is part of a fusion)."""
    computation = computations[name]
    for instruction in computation.instructions.values():
        yield instruction, computation, times, fused
        if instruction.opcode == "while":
            body, condition = _attribute(instruction, "body"), _attribute(instruction, "condition")
            assert body is not None
            assert condition is not None
            trips = _trips(computations[condition], computations[body])
            yield from _walk(computations, body, times * trips, fused)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
            names = _NAME.findall(branches[1]) if branches else []
            for branch in names or re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.text):
                yield from _walk(computations, branch, times, fused)
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


def _kind(instruction: _Instruction) -> str | None:
    """Returns which collective an instruction is; one that is split into start and done counts at its start."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def _collective(instruction: _Instruction, kind: str, times: int, slices: np.ndarray | None) -> Collective:
    payload = _bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        # A tuple of what goes in, what comes out, and of signals.
        parts = [_bytes(array[0]) for array in re.finditer(r"\w+\[[\d,]*\](\{[^}]*\})?", instruction.shape)]
        payload = max(parts) if kind != "all-reduce" else payload
    group = _groups(instruction)
    size = 2 if kind == "collective-permute" else len(group) if group is not None else 2
    share = (size - 1) / size
    wire = {
        "all-reduce": 2 * payload * share,  # scattered sums, gathered again
        "reduce-scatter": payload * (size - 1),
        "collective-permute": payload,
    }.get(kind, payload * share)
    across = slices is not None and group is not None and len(set(slices[group])) > 1
    return Collective(kind, times, payload, wire, size, bool(across))


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
    name = _attribute(instruction, "calls")
    inner = computations.get(name) if name else None
    if inner is None:
        return _bytes(instruction.shape) + sum(_bytes(operand.shape) for operand in operands)
    return _fusion_reads(inner, operands) + _fusion_writes(inner, instruction)


def _fusion_reads(inner: _Computation, operands: list[_Instruction]) -> float:
    """Returns the bytes a fusion reads; of an operand that it only slices or updates in place, those it touches."""
    total = 0.0
    parameters = {
        int(found[1]): i
        for i in inner.instructions.values()
        if i.opcode == "parameter" and (found := re.match(r"parameter\((\d+)\)", i.text))
    }
    for number, operand in enumerate(operands):
        parameter = parameters.get(number)
        users = [i for i in inner.instructions.values() if parameter is not None and parameter.name in i.operands]
        if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
            total += min(_bytes(operand.shape), sum(_bytes(user.shape) for user in users))
        elif parameter is None or not users or not all(_updates(user, parameter.name) for user in users):
            total += _bytes(operand.shape)
    return total


def _updates(instruction: _Instruction, name: str) -> bool:
    """Whether an instruction writes a piece into what is called `name`, in place."""
    return instruction.opcode == "dynamic-update-slice" and instruction.operands[0] == name


def _fusion_writes(inner: _Computation, instruction: _Instruction) -> float:
    updates = [i for i in inner.instructions.values() if i.opcode == "dynamic-update-slice"]
    whole = _bytes(instruction.shape)
    for update in updates:
        piece = inner.instructions.get(update.operands[1])
        if piece is not None:
            whole -= max(0.0, _bytes(update.shape) - _bytes(piece.shape))
    return max(whole, 0.0)
