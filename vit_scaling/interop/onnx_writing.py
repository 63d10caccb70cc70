"""From a JAX function of one batch of images to an ONNX graph: each primitive becomes the ONNX operators that mean it.

The function is traced once, with a symbolic batch size. What does not depend on the images (parameters, positions,
bias tables) is computed while the graph is written and becomes an initializer; loops over layers are unrolled. A
primitive without an entry in `onnx_rules.RULES` is an error that names it. Needs the package `onnx` (extra "serving").
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from vit_scaling.interop import onnx_rules as rules
from vit_scaling.interop.onnx_rules import Graph, Node, Value

OPSET = 18
BATCH = "batch"


def model(function: Callable[[jax.Array], jax.Array], image_shape: tuple[int, ...], dtype: str, title: str) -> Any:
    """Returns the ONNX model of a function from images [batch, *image_shape] to one array [batch, ...].

    Raises:
        ImportError: the package onnx is not installed.
        NotImplementedError: the function uses a primitive that has no rule; the error names it.
    """
    import onnx

    (batch,) = jax.export.symbolic_shape(BATCH)
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *image_shape), dtype))
    graph = Graph("images", onnx)
    (result,) = _run(graph, closed.jaxpr, closed.consts, [Node("images", (batch, *image_shape))])
    kind = onnx.helper.np_dtype_to_tensor_dtype
    graph.nodes.append(onnx.helper.make_node("Identity", [graph.whole(result)], ["logits"]))
    output = closed.out_avals[0]
    images = onnx.helper.make_tensor_value_info("images", kind(np.dtype(dtype)), [BATCH, *image_shape])
    logits = onnx.helper.make_tensor_value_info("logits", kind(output.dtype), [BATCH, *output.shape[1:]])
    whole = onnx.helper.make_graph(graph.nodes, "model", [images], [logits], graph.initializers)
    return onnx.helper.make_model(
        whole, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8, producer_name=title
    )


def _run(graph: Graph, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """Returns the results of a jaxpr, computed where they are constant and written into the graph elsewhere."""
    known: dict[Any, Value] = {}
    known.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def value(variable: Any) -> Value:
        return np.asarray(variable.val) if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs = [value(variable) for variable in equation.invars]
        inner = next((equation.params[key] for key in ("jaxpr", "call_jaxpr") if key in equation.params), None)
        if equation.primitive.name == "scan":
            results = _unrolled(graph, equation.params, inputs)
        elif inner is not None:
            results = _run(graph, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        else:
            results = _one(graph, equation, inputs)
        known.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _one(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    name, params, out = equation.primitive.name, equation.params, equation.outvars[0].aval
    fixed = all(isinstance(size, int) for size in out.shape)
    if fixed and not any(isinstance(value, Node) for value in inputs):
        if name == "broadcast_in_dim":  # a view, so that the graph stores no repetition
            placed = np.reshape(np.asarray(inputs[0]), rules.placed_shape(inputs[0].shape, params))
            return [np.broadcast_to(placed, out.shape)]
        if name in ("reshape", "squeeze"):  # without a compilation
            return [np.reshape(np.asarray(inputs[0]), out.shape)]
        if name in rules.ARITHMETIC:
            return [np.asarray(rules.ARITHMETIC[name](*inputs), out.dtype)]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            result = equation.primitive.bind(*inputs, **params)
        return [np.asarray(part) for part in (result if equation.primitive.multiple_results else [result])]
    if name in rules.ALIASES:
        return list(inputs)
    if name == "split":
        return rules.split(graph, equation, inputs)
    if name in rules.ELEMENTWISE:
        result = graph.op(rules.ELEMENTWISE[name], *map(graph.broadcastable, inputs))
    elif name in rules.RULES:
        result = rules.RULES[name](graph, equation, inputs)
    else:
        raise NotImplementedError(f"the model uses {name}, which has no rule for ONNX")
    return [Node(result, out.shape)]


def _unrolled(graph: Graph, params: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes a scan once for each of its steps."""
    body, length = params["jaxpr"], params["length"]
    if "ft_in" in params:  # JAX 0.12
        constants, carried = (len(list(part)) for part in params["ft_in"].unpack()[:2])
    else:
        constants, carried = params["num_consts"], params["num_carry"]
    first, last = constants, constants + carried
    consts, carry, xs = inputs[:first], list(inputs[first:last]), inputs[last:]
    stacked: list[list[Value]] = []
    for step in reversed(range(length)) if params["reverse"] else range(length):
        each = [rules.taken(graph, value, step) for value in xs]
        results = _run(graph, body.jaxpr, body.consts, [*consts, *carry, *each])
        carry = results[: len(carry)]
        stacked.append(results[len(carry) :])
    if params["reverse"]:
        stacked.reverse()
    return [*carry, *(rules.stacked(graph, parts, axis=0) for parts in zip(*stacked, strict=True))]
