"""What each JAX primitive is in ONNX: operators for what depends on the images, NumPy for some of the rest."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Node(NamedTuple):
    """An array that is computed when the graph runs; `shape` has symbolic sizes for what depends on the batch."""

    name: str
    shape: tuple[Any, ...]


Value = Node | np.ndarray
Rule = Callable[["Graph", Any, Sequence[Any]], Any]


class Graph:
    """The nodes and initializers of an ONNX graph that is being written."""

    def __init__(self, images: str, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._images = images
        self._batch: str | None = None
        self._count = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output and returns the output's name."""
        name = self._new(kind)
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Any) -> str:
        """Adds an initializer and returns its name; an axis along which a broadcast array repeats is stored once."""
        array = np.asarray(array)
        array = array[tuple(slice(0, 1) if step == 0 else slice(None) for step in array.strides)]
        return self.exactly(array)

    def exactly(self, array: Any) -> str:
        """Adds an initializer of just this shape and returns its name."""
        name = self._new("constant")
        self.initializers.append(self.onnx.numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def integers(self, values: Sequence[Any]) -> str:
        return self.exactly(np.array(values, np.int64))

    def whole(self, value: Value) -> str:
        """Returns the name of a value in its full shape."""
        return value.name if isinstance(value, Node) else self.exactly(value)

    def broadcastable(self, value: Value) -> str:
        """Returns the name of a value for an operator that broadcasts."""
        return value.name if isinstance(value, Node) else self.constant(value)

    def reshape(self, name: str, shape: Sequence[Any]) -> str:
        symbolic = [size for size in shape if not isinstance(size, int)]
        if len(symbolic) > 1:
            return self.op("Reshape", name, self.sizes(shape))
        return self.op("Reshape", name, self.integers([size if isinstance(size, int) else -1 for size in shape]))

    def sizes(self, shape: Sequence[Any]) -> str:
        """Returns a vector of sizes as the graph computes it."""
        parts = [self.integers([size]) if isinstance(size, int) else self._symbolic(size) for size in shape]
        return self.op("Concat", *parts, axis=0)

    def _symbolic(self, size: Any) -> str:
        factor = _multiple(size)
        if self._batch is None:
            self._batch = self.op("Shape", self._images, start=0, end=1)
        return self._batch if factor == 1 else self.op("Mul", self._batch, self.integers([factor]))

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"


def _multiple(size: Any) -> int:
    """Returns k of a symbolic size k * batch."""
    symbol = next(iter(size._get_vars()))
    factors = {size._evaluate({symbol: count}) / count for count in (1, 2, 3)}
    if len(factors) != 1:
        raise NotImplementedError(f"a size is {size}, which is no multiple of the batch size")
    return int(factors.pop())


# ---- rules: (graph, equation, inputs) to the name of the result


def taken(graph: Graph, value: Value, index: int) -> Value:
    if isinstance(value, np.ndarray):
        return np.asarray(value[index])
    return Node(graph.op("Gather", value.name, graph.exactly(np.int64(index)), axis=0), value.shape[1:])


def stacked(graph: Graph, parts: Sequence[Value], axis: int) -> Node:
    shape = parts[0].shape
    names = [graph.op("Unsqueeze", graph.whole(part), graph.integers([axis])) for part in parts]
    return Node(graph.op("Concat", *names, axis=axis), (*shape[:axis], len(parts), *shape[axis:]))


def placed_shape(shape: Sequence[Any], params: Any) -> list[Any]:
    """Returns the shape with an axis of 1 where broadcast_in_dim adds one."""
    placed: list[Any] = [1] * len(params["shape"])
    for size, axis in zip(shape, params["broadcast_dimensions"], strict=True):
        placed[axis] = size
    return placed


def _broadcast(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    (value, *_), params = inputs, equation.params
    placed = placed_shape(value.shape, params)
    name = graph.whole(value)
    if list(value.shape) != placed:
        name = graph.reshape(name, placed)
    if placed == list(params["shape"]):
        return name
    # An axis that is there already keeps its size when it is expanded to 1.
    wanted = [1 if have == want else want for have, want in zip(placed, params["shape"], strict=True)]
    return graph.op("Expand", name, graph.sizes(wanted))


def _cast(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(equation.params["new_dtype"]))
    return graph.op("Cast", graph.whole(inputs[0]), to=kind)


def _dot_general(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = inputs
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_sum, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_sum, *right_batch)]

    def arranged(value: Value, *groups: Sequence[int], kept: int) -> str:
        """Transposes to the order of the groups and makes one axis of each group but the first `kept` axes."""
        order = [axis for group in groups for axis in group]
        lead = [value.shape[axis] for axis in order[:kept]]
        rest = [group for group in groups if kept == 0 or group is not groups[0]]
        shape = [*lead, *(math.prod(value.shape[axis] for axis in group) for group in rest)]
        if isinstance(value, np.ndarray):
            return graph.exactly(value.transpose(order).reshape(shape))
        name = value.name if order == sorted(order) else graph.op("Transpose", value.name, perm=order)
        return name if shape == [value.shape[axis] for axis in order] else graph.reshape(name, shape)

    if not left_batch and isinstance(left, Node) and len(left_sum) == 1 and left_free:
        name = arranged(left, left_free, left_sum, kept=len(left_free))
    else:
        name = arranged(left, left_batch, left_free, left_sum, kept=len(left_batch))
    name = graph.op("MatMul", name, arranged(right, right_batch, right_sum, right_free, kept=len(right_batch)))
    return graph.reshape(name, equation.outvars[0].aval.shape)


def _conv(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    params, (image, kernel) = equation.params, inputs
    numbers = params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NotImplementedError("a convolution of the model is transposed or grouped over the batch")
    kernel = kernel.transpose(numbers.rhs_spec) if isinstance(kernel, np.ndarray) else kernel
    weights = (
        graph.exactly(kernel)
        if isinstance(kernel, np.ndarray)
        else graph.op("Transpose", kernel.name, perm=numbers.rhs_spec)
    )
    name = graph.op(
        "Conv",
        graph.op("Transpose", graph.whole(image), perm=numbers.lhs_spec),
        weights,
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
        pads=[pair[end] for end in (0, 1) for pair in params["padding"]],
    )
    return graph.op("Transpose", name, perm=np.argsort(numbers.out_spec).tolist())


def _pool(kind: str) -> Rule:
    def rule(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
        params = equation.params
        window = params["window_dimensions"]
        if set(params["base_dilation"]) != {1} or set(params["window_dilation"]) != {1} or window[0] != 1:
            raise NotImplementedError("a pooling of the model is dilated or goes over the batch")
        pooled = [axis for axis in range(1, len(window)) if window[axis] != 1 or params["window_strides"][axis] != 1]
        order = [0, *(axis for axis in range(1, len(window)) if axis not in pooled), *pooled]
        if len(order) - len(pooled) != 2:
            raise NotImplementedError("a pooling of the model has not one batch and one channel axis")
        options = {"count_include_pad": 1} if kind == "AveragePool" else {}
        name = graph.op(
            kind,
            graph.op("Transpose", graph.whole(inputs[0]), perm=order),
            kernel_shape=[window[axis] for axis in pooled],
            strides=[params["window_strides"][axis] for axis in pooled],
            pads=[params["padding"][axis][end] for end in (0, 1) for axis in pooled],
            **options,
        )
        if kind == "AveragePool":
            name = graph.op("Mul", name, graph.exactly(np.float32(math.prod(window))))
        return graph.op("Transpose", name, perm=np.argsort(order).tolist())

    return rule


def _gather(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    """A slice at a known position, which is what JAX makes of x[:, 2:5] or x[:, 0] where a size is symbolic."""
    (value, start), params = inputs, equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims or not isinstance(start, np.ndarray) or start.ndim != 1:
        raise NotImplementedError("the model gathers entries at more than one position")
    starts = [0] * len(sizes)
    for axis, position in zip(numbers.start_index_map, start.tolist(), strict=True):
        starts[axis] = min(max(position, 0), value.shape[axis] - sizes[axis])
    name = _cut(graph, value, starts, [low + size for low, size in zip(starts, sizes, strict=True)])
    return graph.reshape(name, equation.outvars[0].aval.shape) if numbers.collapsed_slice_dims else name


def _slice(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    params = equation.params
    return _cut(graph, inputs[0], params["start_indices"], params["limit_indices"], params["strides"])


def _cut(graph: Graph, value: Value, starts: Sequence[int], limits: Sequence[Any], steps: Any = None) -> str:
    parts = zip(range(len(starts)), starts, limits, steps or (1,) * len(starts), strict=True)
    cut = [part for part in parts if part[1:] != (0, value.shape[part[0]], 1)]
    if not cut:
        return graph.whole(value)
    axes, low, high, step = map(graph.integers, zip(*cut, strict=True))
    return graph.op("Slice", graph.whole(value), low, high, axes, step)


def split(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """The only primitive here of several results."""
    axis, shape, at = equation.params["axis"], inputs[0].shape, 0
    parts: list[Value] = []
    for out, size in zip(equation.outvars, equation.params["sizes"], strict=True):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = at, at + size
        parts.append(Node(_cut(graph, inputs[0], starts, limits), out.aval.shape))
        at += size
    return parts


def _pad(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    value, fill = inputs
    config = equation.params["padding_config"]
    if any(inside for _, _, inside in config):
        raise NotImplementedError("the model pads between the entries of an array")
    pads = graph.integers([low for low, _, _ in config] + [high for _, high, _ in config])
    return graph.op("Pad", graph.whole(value), pads, graph.whole(fill))


def _reduce(kind: str) -> Rule:
    def rule(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
        return graph.op(kind, graph.whole(inputs[0]), graph.integers(equation.params["axes"]), keepdims=0)

    return rule


def _select(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    which, false, true = map(graph.broadcastable, inputs)
    return graph.op("Where", which, true, false)


def _integer_pow(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    exponent = graph.exactly(np.float32(equation.params["y"]))
    return graph.op("Pow", graph.whole(inputs[0]), exponent)


def _after(kind: str, last: str) -> Rule:
    return lambda graph, equation, inputs: graph.op(last, graph.op(kind, *map(graph.broadcastable, inputs)))


def _square(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    name = graph.whole(inputs[0])
    return graph.op("Mul", name, name)


def _erfc(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    return graph.op("Sub", graph.exactly(np.float32(1)), graph.op("Erf", graph.whole(inputs[0])))


def _reshape(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    return graph.reshape(graph.whole(inputs[0]), equation.outvars[0].aval.shape)


def _transpose(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    return graph.op("Transpose", graph.whole(inputs[0]), perm=equation.params["permutation"])


def _stack(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    return stacked(graph, inputs, equation.params["axis"]).name


def _concatenate(graph: Graph, equation: Any, inputs: Sequence[Value]) -> str:
    return graph.op("Concat", *map(graph.whole, inputs), axis=equation.params["dimension"])


ALIASES = {"stop_gradient", "copy", "name", "reduce_precision", "sharding_constraint", "optimization_barrier"}
ELEMENTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "neg": "Neg", "abs": "Abs",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh", "erf": "Erf", "logistic": "Sigmoid", "sin": "Sin",
    "cos": "Cos", "eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual",
    "and": "And", "or": "Or", "not": "Not", "pow": "Pow",
}  # fmt: skip
ARITHMETIC: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}
RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _cast,
    "dot_general": _dot_general,
    "erfc": _erfc,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "ne": _after("Equal", "Not"),
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "reshape": _reshape,
    "rsqrt": _after("Sqrt", "Reciprocal"),
    "select_n": _select,
    "slice": _slice,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": _transpose,
}
