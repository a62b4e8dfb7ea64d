"""A small builder for ONNX graphs. Values are known by their names, weights by their parameter's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from vitalrt.export.weights import BLOCK_SIZE, WeightLayout

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
Dims = list[int | str]


class GraphBuilder:
    """Nodes in the order in which they are added. A loop's body is a builder of its own that names the outer values."""

    def __init__(self, layout: WeightLayout, outer: GraphBuilder | None = None) -> None:
        self.layout = layout
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._public: dict[str, str] = {}
        self._outer = outer
        self._names: Iterator[int] = outer._names if outer else itertools.count()
        self._initializers: dict[str, TensorProto] = outer._initializers if outer else {}

    def input(self, name: str, data_type: int, dims: Dims) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, data_type, dims))
        return name

    def output(self, name: str, value: str, data_type: int, dims: Dims) -> None:
        """Give a node's output its public name. No Identity node: it would stand between a cache and its buffer."""
        self._public[value] = name
        self.outputs.append(helper.make_tensor_value_info(name, data_type, dims))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output. Returns the output's name."""
        return self.ops(1, kind, *inputs, **attributes)[0]

    def ops(self, num_outputs: int, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        outputs = [f"{kind}_{next(self._names)}" for _ in range(num_outputs)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def ints(self, *values: int) -> str:
        """int64 [n]."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, data_type: int | None = None) -> str:
        """A scalar, of the weights' type unless another is given."""
        dtype = helper.tensor_dtype_to_np_dtype(self.layout.data_type if data_type is None else data_type)
        return self.constant(np.array(value, dtype))

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{value.dtype}_{list(value.shape)}_{value.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, f"constant_{next(self._names)}")
        return self._initializers[name].name

    def weight(self, name: str) -> str:
        self._initializers.setdefault(name, self.layout.entries[name].proto())
        return name

    def linear(self, x: str, module: str, *, bias: bool = False) -> str:
        """x: [..., in].  Returns [..., out]."""
        weight = f"{module}.weight"
        if self.layout.is_quantized(weight):
            tensors = (self.weight(f"{weight}.int8"), self.weight(f"{weight}.scale"))
            out_features = self.layout.entries[f"{weight}.int8"].dims[0]
            sizes = {"K": self.layout.in_features[weight], "N": out_features, "bits": 8, "block_size": BLOCK_SIZE}
            if self.layout.data_type == TensorProto.FLOAT:
                # Multiply in int8, with inputs quantized as they come; in fp16 the CPU provider's result would be off.
                sizes["accuracy_level"] = 4
            x = self.op("MatMulNBits", x, *tensors, domain=MICROSOFT, **sizes)
        else:
            x = self.op("MatMul", x, self.weight(weight))
        return self.op("Add", x, self.weight(f"{module}.bias")) if bias else x

    def cast(self, x: str, data_type: int) -> str:
        return self.op("Cast", x, to=data_type)

    def to_float(self, x: str) -> str:
        """From the weights' type to fp32; nothing to do where they are the same."""
        return x if self.layout.data_type == TensorProto.FLOAT else self.cast(x, TensorProto.FLOAT)

    def to_weights(self, x: str) -> str:
        """From fp32 to the weights' type."""
        return x if self.layout.data_type == TensorProto.FLOAT else self.cast(x, self.layout.data_type)

    def reshape(self, x: str, *dims: int | str) -> str:
        """dims: numbers as ONNX's Reshape takes them (0 keeps, -1 infers), or names of int64 [1] values."""
        if all(isinstance(dim, int) for dim in dims):
            return self.op("Reshape", x, self.ints(*dims))  # type: ignore[arg-type]
        parts = [self.ints(dim) if isinstance(dim, int) else dim for dim in dims]
        return self.op("Reshape", x, self.op("Concat", *parts, axis=0))

    def size(self, x: str, axis: int) -> str:
        """int64 [1]: the length of one axis."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def arange(self, count: str) -> str:
        """count: int64 [1].  Returns int64 [count]: 0, 1, ..."""
        zero, one = self.number(0, TensorProto.INT64), self.number(1, TensorProto.INT64)
        return self.op("Range", zero, self.op("Squeeze", count), one)

    def split(self, x: str, sizes: tuple[int, ...], axis: int) -> list[str]:
        return self.ops(len(sizes), "Split", x, self.ints(*sizes), axis=axis)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def graph(self, name: str) -> GraphProto:
        """The finished graph; an inner one leaves its weights and constants to the outermost."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [self._public.get(value, value) for value in names]
        initializers = [] if self._outer else list(self._initializers.values())
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, initializers)

    def model(self, name: str, opset: int) -> ModelProto:
        """With the oldest file format that may hold the opset, for the widest choice of runtimes."""
        opsets = [helper.make_operatorsetid("", opset)]
        version = helper.find_min_ir_version_for(opsets)
        if self.layout.int8:
            opsets.append(helper.make_operatorsetid(MICROSOFT, 1))
        return helper.make_model(self.graph(name), opset_imports=opsets, ir_version=version, producer_name="vitalrt")
