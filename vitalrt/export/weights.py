"""Where every weight lies in the one external data file that all graphs of an export share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import TensorProto
from torch import nn

from vitalrt.export.sessions import WEIGHTS_FILE
from vitalrt.model.qwen3_vl import Qwen3VL

ALIGNMENT = 64  # bytes; ONNX Runtime maps the file, and vector loads want aligned rows
BLOCK_SIZE = 32  # weights that share one scale in int8
DATA_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.  source: the parameter it is made of.  offset, num_bytes: in the file."""

    name: str
    source: str
    data_type: int
    dims: tuple[int, ...]
    offset: int
    num_bytes: int

    def proto(self) -> TensorProto:
        tensor = TensorProto(name=self.name, data_type=self.data_type, dims=self.dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", self.offset), ("length", self.num_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class WeightLayout:
    """Names, types and places of all weights, known before any of them is read: parameters may be on "meta".

    Linear weights are stored [in, out] as MatMul takes them; with int8 they become, per output, blocks of 32 inputs
    with one scale each, as MatMulNBits takes them. Embeddings, head, biases and norms keep layout and dtype.
    """

    def __init__(self, model: Qwen3VL, dtype: torch.dtype, *, int8: bool) -> None:
        self.dtype = dtype
        self.data_type = DATA_TYPES[dtype]
        self.int8 = int8
        self.in_features = {
            f"{name}.weight": module.in_features
            for name, module in model.named_modules()
            # The head is the embedding in models that tie them, and worth full precision in all.
            if isinstance(module, nn.Linear) and module is not model.decoder.head
        }
        self.entries: dict[str, Entry] = {}
        self.num_bytes = 0
        for name, parameter in model.named_parameters():
            dims = tuple(parameter.shape)
            if name not in self.in_features:
                self._add(name, name, self.data_type, dims)
            elif not int8:
                self._add(name, name, self.data_type, (dims[1], dims[0]))
            else:
                blocks = -(-dims[1] // BLOCK_SIZE)
                self._add(f"{name}.int8", name, TensorProto.UINT8, (dims[0], blocks, BLOCK_SIZE))
                self._add(f"{name}.scale", name, self.data_type, (dims[0], blocks))

    def _add(self, name: str, source: str, data_type: int, dims: tuple[int, ...]) -> None:
        item_bytes = 1 if data_type == TensorProto.UINT8 else self.dtype.itemsize
        num_bytes = torch.Size(dims).numel() * item_bytes
        self.entries[name] = Entry(name, source, data_type, dims, self.num_bytes, num_bytes)
        self.num_bytes = -(-(self.num_bytes + num_bytes) // ALIGNMENT) * ALIGNMENT

    def is_quantized(self, name: str) -> bool:
        return self.int8 and name in self.in_features

    def write(self, model: Qwen3VL, directory: Path) -> None:
        """Writes WEIGHTS_FILE, one tensor in memory at a time.  model: on the CPU, in the layout's dtype."""
        with (directory / WEIGHTS_FILE).open("wb") as file:
            for name, parameter in model.named_parameters():
                for stored, tensor in self._stored(name, parameter):
                    file.seek(self.entries[stored].offset)
                    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            file.truncate(self.num_bytes)

    def _stored(self, name: str, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name not in self.in_features:
            yield name, parameter
        elif not self.int8:
            yield name, parameter.T
        else:
            packed, scales = _quantize(parameter)
            yield f"{name}.int8", packed
            yield f"{name}.scale", scales.to(self.dtype)


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: [out, in].  Returns uint8 [out, blocks, 32] around 128 and fp32 scales [out, blocks]."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=8)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight.float().T.contiguous().numpy())
    return torch.from_numpy(packed), torch.from_numpy(scales)
