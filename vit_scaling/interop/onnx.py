"""Plain ViTs in ONNX files: tensors under the names of their modules, and what the graph tells of the network.

An ONNX file is one Protocol Buffers message (onnx/onnx, onnx.proto); the few fields that matter are read here, straight
from the mapped file, so no package is needed and no tensor is copied before it is wanted. Exporters fold transposes and
slices into the parameters and lose their names ("onnx::MatMul_1966"). They are found again through the graph: a product
is named by the bias that is added to it, or else by its node's scope.
"""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_scaling import UserError
from vit_scaling.interop.stored import Stored

KEY = "onnx"  # under which `open_onnx` adds what the graph tells to what config.json says
MAX_PARTS = 200_000  # nodes and tensors; a ViT of a hundred layers has fewer than 20,000
_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    6: np.dtype(np.int32),
}
_TYPES |= {7: np.dtype(np.int64), 16: np.dtype(ml_dtypes.bfloat16), 9: np.dtype(np.bool_), 3: np.dtype(np.int8)}
# Where the position table stands beside each patch embedding.
_POSITIONS = {
    "embeddings.patch_embeddings.projection": "embeddings.position_embeddings",
    "patch_embed.proj": "pos_embed",
}


class _DamagedError(ValueError):
    pass


class _Message(NamedTuple):
    """One message: `buffer` from `start` to `end`."""

    buffer: Any
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, Any]]:
        """Yields (number, value): an int, four or eight bytes, or a message for anything with a length."""
        at = self.start
        while at < self.end:
            tag, at = self._varint(at)
            kind = tag & 7
            if tag >> 3 == 0:
                raise _DamagedError("a field without a number")
            if kind == 0:
                value, at = self._varint(at)
                yield tag >> 3, value
                continue
            if kind not in (1, 2, 5):
                raise _DamagedError(f"wire type {kind}")
            length, at = self._varint(at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if length > self.end - at:
                raise _DamagedError("a field is longer than what holds it")
            part = _Message(self.buffer, at, at + length)
            yield tag >> 3, part if kind == 2 else part.bytes()
            at += length

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= self.end:
                raise _DamagedError("it ends within a number")
            byte = self.buffer[at]
            value |= (byte & 127) << shift
            at += 1
            if byte < 128:
                return value, at
        raise _DamagedError("a number has more than ten bytes")

    def bytes(self) -> bytes:
        return bytes(self.buffer[self.start : self.end])

    def text(self) -> str:
        return self.bytes().decode()

    def all(self, number: int) -> list[Any]:
        return [value for found, value in self.fields() if found == number]

    def integers(self, number: int) -> list[int]:
        """Returns a repeated field of whole numbers, packed or not."""
        found: list[int] = []
        for value in self.all(number):
            if isinstance(value, int):
                found.append(value)
                continue
            at = value.start
            while at < value.end:
                number_, at = value._varint(at)
                found.append(number_)
        return [value - (1 << 64) if value >= 1 << 63 else value for value in found]


class _Node(NamedTuple):
    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, _Message]

    def number(self, name: str, default: float) -> float:
        """Returns an attribute that is a number."""
        for number, value in self.attributes[name].fields() if name in self.attributes else ():
            if number == 2:
                return struct.unpack("<f", value)[0]
            if number == 3:
                return value
        return default


def open_onnx(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Opens an ONNX file of a plain ViT.

    Returns:
        (tensors by name, what the graph tells: heads, gelu, norm_eps and input_size, each where it does).

    Raises:
        UserError: it is no whole ONNX file.
    """
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        graphs = _Message(buffer, 0, len(buffer)).all(7)
        if len(graphs) != 1:
            raise _DamagedError(f"it has {len(graphs)} graphs")
        return _Graph(path, graphs[0]).read()
    except (_DamagedError, ValueError, AttributeError, TypeError, KeyError, struct.error, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole ONNX file: {error}") from None


class _Graph:
    def __init__(self, path: Path, graph: _Message):
        self.path = path
        self.nodes: list[_Node] = []
        self.tensors: dict[str, Stored] = {}
        self.input_size: tuple[int, int] | None = None
        for count, (number, value) in enumerate(graph.fields()):
            if count > MAX_PARTS:
                raise UserError(f"{path} has more than {MAX_PARTS:,} nodes and tensors; that is no ViT")
            if number == 1:
                self.nodes.append(_node(value))
            elif number == 5:
                name, stored = _tensor(value, path)
                self.tensors[name] = stored
            elif number == 11 and self.input_size is None:
                self.input_size = _input_size(value)
        self.constants = {
            node.outputs[0]: _tensor(value, path)[1]
            for node in self.nodes
            if node.kind == "Constant" and "value" in node.attributes
            for value in node.attributes["value"].all(5)
        }
        self.whole = self.constants | self.tensors
        self.users: dict[str, list[_Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)

    def read(self) -> tuple[dict[str, Stored], dict[str, Any]]:
        floats = {name: tensor for name, tensor in self.whole.items() if "float" in tensor.dtype}
        named = {name: tensor for name, tensor in floats.items() if name in self.tensors and _named(name)}
        for node in self.nodes:
            if node.kind == "MatMul" and node.inputs[1] in floats and node.inputs[1] not in named:
                named[f"{self._module(node)}.weight"] = floats[node.inputs[1]].transposed()
            elif node.kind == "Gemm" and node.inputs[1] in floats and not node.number("transB", 0):
                own = named.pop(node.inputs[1], None)
                bias = node.inputs[2] if len(node.inputs) > 2 else ""
                name = node.inputs[1] if own else f"{bias.removesuffix('.bias') or _scope(node.name)}.weight"
                named[name] = floats[node.inputs[1]].transposed()
        self._name_positions(named, floats)
        return named, self._facts(named)

    def _module(self, node: _Node) -> str:
        for user in self.users.get(node.outputs[0], []):
            for name in user.inputs if user.kind == "Add" else ():
                if name in self.tensors and _named(name) and name.endswith(".bias"):
                    return name.removesuffix(".bias")
        return _scope(node.name)

    def _name_positions(self, named: dict[str, Stored], floats: dict[str, Stored]) -> None:
        """Names a position table that the exporter cut into the class token's row and the patches'."""
        for patch, positions in _POSITIONS.items():
            for name in [name for name in named if name.endswith(f"{patch}.weight")]:
                prefix, width = name.removesuffix(f"{patch}.weight"), named[name].shape[0]
                rows = {
                    each: tensor
                    for each, tensor in floats.items()
                    if not _named(each) and len(tensor.shape) == 3 and tensor.shape[0] == 1 and tensor.shape[2] == width
                }
                parts = sorted(rows.values(), key=lambda tensor: tensor.shape[1])
                if f"{prefix}{positions}" not in named and len(parts) in (1, 2):
                    shape = (1, sum(part.shape[1] for part in parts), width)
                    read = lambda parts=parts: np.concatenate([part.read() for part in parts], axis=1)  # noqa: E731
                    named[f"{prefix}{positions}"] = Stored(shape, parts[0].dtype, read)

    def _facts(self, named: dict[str, Stored]) -> dict[str, Any]:
        found: dict[str, Any] = {"heads": self._heads(named), "gelu": self._gelu(), "norm_eps": self._eps()}
        found["input_size"] = self.input_size
        return {name: value for name, value in found.items() if value is not None}

    def _gelu(self) -> str | None:
        kinds = Counter(node.kind for node in self.nodes)
        if kinds["Gelu"]:
            parts = [node.attributes.get("approximate") for node in self.nodes if node.kind == "Gelu"]
            tanh = any(text.text() == "tanh" for part in parts if part is not None for text in part.all(4))
            return "tanh" if tanh else "exact"
        if kinds["Erf"] or kinds["Tanh"]:
            return "exact" if kinds["Erf"] else "tanh"
        scalars = [float(value.read()) for value in self.constants.values() if value.shape == ()]
        return "quick" if any(abs(value - 1.702) < 1e-6 for value in scalars) else None

    def _eps(self) -> float | None:
        """Returns the epsilon of every norm.

        Raises:
            UserError: norms have different ones.
        """
        found = {node.number("epsilon", 1e-5) for node in self.nodes if node.kind == "LayerNormalization"}
        means = {node.outputs[0] for node in self.nodes if node.kind == "ReduceMean"}
        for node in self.nodes:
            if node.kind == "Add" and means & set(node.inputs):
                found |= {float(self.whole[name].read()) for name in node.inputs if name in self.whole}
        if len(found) > 1:
            shown = ", ".join(f"{value:.3g}" for value in sorted(found))
            raise UserError(f"{self.path} has norms of different epsilon: {shown}; models here have one")
        return float(f"{found.pop():.6g}") if found else None  # 1e-6 was stored as float32

    def _heads(self, named: dict[str, Stored]) -> int | None:
        """Returns the heads: queries are reshaped to [..., heads, head dim], and nothing else to so few channels."""
        makers = {name: node for node in self.nodes for name in node.outputs}
        width = next((t.shape[0] for name, t in named.items() for p in _POSITIONS if name.endswith(f"{p}.weight")), 0)
        found = set()
        for node in self.nodes:
            maker = makers.get(node.inputs[1]) if node.kind == "Reshape" else None
            parts = maker.inputs if maker is not None and maker.kind == "Concat" else node.inputs[1:2]
            shape = [int(v) for p in parts for v in (np.ravel(self.whole[p].read()) if p in self.whole else [-1])]
            if node.kind == "Reshape" and len(shape) >= 4 and 0 < shape[-1] < width:
                found.add(width // shape[-1])
        return found.pop() if len(found) == 1 else None


def _named(name: str) -> bool:
    """Whether a tensor has its module's name, rather than a number that the exporter gave it."""
    return not re.match(r"onnx::|val_\d+|_val|/|Constant|\d+$", name)


def _scope(name: str) -> str:
    """Returns the module of a node "/blocks/blocks.0/attn/qkv/MatMul": "blocks.0.attn.qkv"."""
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _node(message: _Message) -> _Node:
    names: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""]}
    attributes = {}
    for number, value in message.fields():
        if number in names:
            names[number].append(value.text())
        elif number == 5:
            attributes["".join(part.text() for part in value.all(1))] = value
    return _Node(names[4][-1], names[3][-1], names[1], names[2], attributes)


def _tensor(message: _Message, path: Path) -> tuple[str, Stored]:
    """Returns (name, tensor) of a TensorProto; its data may lie in the file only."""
    kind, name, shape = 0, "", tuple(message.integers(1))
    raw: _Message | None = None
    numbers: list[_Message] = []
    outside: dict[str, str] = {}
    for number, value in message.fields():
        if number == 2:
            kind = value
        elif number == 8:
            name = value.text()
        elif number == 9:
            raw = value
        elif number == 4:
            numbers.append(value)
        elif number == 13:
            outside["".join(part.text() for part in value.all(1))] = "".join(part.text() for part in value.all(2))
    if any(side < 0 for side in shape):
        raise _DamagedError(f"the tensor {name!r} has the shape {shape}")
    dtype = _TYPES.get(kind)
    if dtype is None:
        return name, Stored(shape, f"ONNX type {kind}", lambda: np.zeros(0))

    def read() -> np.ndarray:
        data = raw.bytes() if raw is not None else b"".join(v if isinstance(v, bytes) else v.bytes() for v in numbers)
        if raw is None and (whole := message.integers(7) or message.integers(5)):
            return np.array(whole, dtype).reshape(shape)
        if outside:
            data = _outside(path, name, outside)
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if len(data) != count * dtype.itemsize:
            raise UserError(f"{path}: the tensor {name!r} of shape {shape} has {len(data)} bytes of data")
        return np.frombuffer(data, dtype).reshape(shape)

    return name, Stored(shape, dtype.name, read)


def _outside(path: Path, name: str, outside: dict[str, str]) -> bytes:
    """Returns a tensor's bytes from the file beside the graph, as exporters write large networks."""
    location = outside.get("location", "")
    file = path.parent / location
    if not location or Path(location).name != location or not file.is_file():
        raise UserError(f"{path}: the tensor {name!r} lies in the file {location!r}, which is not in {path.parent}")
    offset, length = int(outside.get("offset", 0)), int(outside.get("length", file.stat().st_size))
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise UserError(f"{path}: the tensor {name!r} reaches beyond the end of {file}")
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(length)


def _input_size(value: _Message) -> tuple[int, int] | None:
    """Returns height and width of a graph's input [batch, 3, height, width], where they are fixed."""
    sides = []
    for kind in value.all(2):
        for tensor in kind.all(1):
            for shape in tensor.all(2):
                sides = [([n for n in dim.all(1) if isinstance(n, int)] or [0])[0] for dim in shape.all(1)]
    return (sides[2], sides[3]) if len(sides) == 4 and sides[2] and sides[3] else None
