"""Qwen3-VL's mathematics as ONNX nodes; vitalrt.model holds the same in torch.

B batch, T tokens, S cache capacity, d width, H query heads, G key/value heads, R = H / G, D head dim;
F frames of one size, P patches of a frame, C tower width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto

from vitalrt.config import DecoderConfig, VisionConfig
from vitalrt.export.builder import GraphBuilder
from vitalrt.model.rope import MRope
from vitalrt.model.vision import EPS

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

Attend = Callable[[int, str, str, str], str]  # layer, q [B, T, H, D], k and v [B, T, G, D] -> [B, T, H * D]


def rms_norm(g: GraphBuilder, x: str, weight: str, eps: float) -> str:
    """Over the last axis, statistics in fp32. Written the way ONNX Runtime recognises and fuses."""
    wide = g.to_float(x)
    mean = g.op("ReduceMean", g.op("Pow", wide, g.number(2.0, FLOAT)), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.number(eps, FLOAT)))
    return g.op("Mul", g.to_weights(g.op("Div", wide, root)), g.weight(weight))


def layer_norm(g: GraphBuilder, x: str, module: str) -> str:
    weights = g.weight(f"{module}.weight"), g.weight(f"{module}.bias")
    return g.op("LayerNormalization", x, *weights, axis=-1, epsilon=EPS)


def rotate(g: GraphBuilder, x: str, cos: str, sin: str, head_dim: int) -> str:
    """x: [..., D]; cos, sin broadcast. Turns the pairs (x_i, x_{i + D/2})."""
    low, high = g.split(x, (head_dim // 2, head_dim // 2), axis=-1)
    turned = g.op("Concat", g.op("Neg", high), low, axis=-1)
    return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))


def cos_sin(g: GraphBuilder, angles: str) -> tuple[str, str]:
    """angles: fp32 [..., D/2].  Returns fp32 [..., 1, D], one axis for the heads."""
    angles = g.unsqueeze(g.op("Concat", angles, angles, axis=-1), -2)
    return g.op("Cos", angles), g.op("Sin", angles)


def mrope(g: GraphBuilder, config: DecoderConfig, positions: str) -> tuple[str, str]:
    """positions: int64 [B, T, 3], or [B, T, 1] where the axes agree.  Returns cos, sin [B, T, 1, D]."""
    rope = MRope(config)
    return cos_sin(g, g.op("Mul", g.cast(positions, FLOAT), g.constant(rope.inverse_frequencies.numpy())))


def attention(g: GraphBuilder, q: str, k: str, v: str, bias: str | None, heads: int, kv_heads: int, width: int) -> str:
    """Grouped attention.  q: [B, T, H, D]; k, v: [B, G, S, D].  Returns [B, T, H * D]. Softmax in fp32.

    bias: fp32, broadcast to the scores [B, G, R * T, S].
    """
    q = g.op("Mul", q, g.number(width**-0.5))
    q = g.reshape(swap(g, q), 0, kv_heads, -1, width)
    scores = g.to_float(g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
    if bias is not None:
        scores = g.op("Add", scores, bias)
    mixed = g.op("MatMul", g.to_weights(g.op("Softmax", scores, axis=-1)), v)
    return g.reshape(swap(g, g.reshape(mixed, 0, heads, -1, width)), 0, 0, heads * width)


def swap(g: GraphBuilder, x: str) -> str:
    """[B, T, H, D] to [B, H, T, D], and back."""
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def decoder_layer(
    g: GraphBuilder, config: DecoderConfig, layer: int, x: str, rope: tuple[str, str], attend: Attend
) -> str:
    """x: [B, T, d].  rope: cos, sin [B, T, 1, D]."""
    root, eps = f"decoder.layers.{layer}", config.rms_norm_eps
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = g.linear(rms_norm(g, x, f"{root}.input_norm.weight", eps), f"{root}.qkv")
    qk, v = g.split(g.reshape(qkv, 0, 0, -1, width), (heads + kv_heads, kv_heads), axis=2)
    qk = rotate(g, rms_norm(g, qk, f"{root}.qk_norm.weight", eps), *rope, width)
    q, k = g.split(qk, (heads, kv_heads), axis=2)
    x = g.op("Add", x, g.linear(attend(layer, q, k, v), f"{root}.o"))
    gate_up = g.linear(rms_norm(g, x, f"{root}.post_norm.weight", eps), f"{root}.gate_up")
    gate, up = g.split(gate_up, (config.intermediate_size, config.intermediate_size), axis=-1)
    gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return g.op("Add", x, g.linear(gated, f"{root}.down"))


def logits(g: GraphBuilder, config: DecoderConfig, hidden: str) -> str:
    """hidden: [B, d] after the final norm.  Returns fp32 [B, vocab]."""
    head = "decoder.embed.weight" if config.tie_word_embeddings else "decoder.head.weight"
    return g.to_float(g.op("Gemm", hidden, g.weight(head), transB=1))


def patch_places(g: GraphBuilder, num_patches: str, grid_hw: str, merge: int) -> tuple[str, str]:
    """Row and column of every patch in merge-block order: int64 [P] each.  grid_hw: int64 [2]."""
    patch, columns = g.arange(num_patches), g.op("Gather", grid_hw, g.ints(1))
    cell = g.ints(merge * merge)
    band = g.op("Mul", columns, g.ints(merge))  # patches in a row of blocks
    in_band, inside = g.op("Mod", patch, band), g.op("Mod", patch, cell)
    block_row, block_column = g.op("Div", patch, band), g.op("Div", in_band, cell)
    side = g.ints(merge)
    row = g.op("Add", g.op("Mul", block_row, side), g.op("Div", inside, side))
    column = g.op("Add", g.op("Mul", block_column, side), g.op("Mod", inside, side))
    return row, column


def place_embedding(g: GraphBuilder, config: VisionConfig, row: str, column: str, grid_hw: str) -> str:
    """The learned square position grid, read bilinearly (corners aligned) at every patch: [P, C]."""
    side = int(config.num_position_embeddings**0.5)
    one, last = g.ints(1), g.ints(side - 1)
    lows, highs, parts = [], [], []
    for axis, place in enumerate((row, column)):
        size = g.op("Max", g.op("Sub", g.op("Gather", grid_hw, g.ints(axis)), one), one)
        exact = g.op("Mul", g.cast(place, FLOAT), g.number(float(side - 1), FLOAT))
        exact = g.op("Div", exact, g.cast(size, FLOAT))
        low = g.op("Min", g.cast(g.op("Floor", exact), INT64), last)
        lows.append(low)
        highs.append(g.op("Min", g.op("Add", low, one), last))
        parts.append(g.op("Sub", exact, g.cast(low, FLOAT)))
    total = ""
    for rows, row_weight in ((lows[0], _rest(g, parts[0])), (highs[0], parts[0])):
        for columns, column_weight in ((lows[1], _rest(g, parts[1])), (highs[1], parts[1])):
            index = g.op("Add", g.op("Mul", rows, g.ints(side)), columns)
            tap = g.to_float(g.op("Gather", g.weight("vision.pos_embed.weight"), index))
            tap = g.op("Mul", tap, g.unsqueeze(g.op("Mul", row_weight, column_weight), 1))
            total = g.op("Add", total, tap) if total else tap
    return g.to_weights(total)


def _rest(g: GraphBuilder, part: str) -> str:
    return g.op("Sub", g.number(1.0, FLOAT), part)


def vision_rope(g: GraphBuilder, config: VisionConfig, row: str, column: str) -> tuple[str, str]:
    """fp32 cos, sin [P, 1, D]: the first quarter of frequencies turns with the row, the second with the column."""
    spatial_dim = config.head_dim // 2
    exponents = torch.arange(0, spatial_dim, 2, dtype=torch.float32) / spatial_dim
    frequencies = g.constant((1.0 / config.rope_theta**exponents).numpy())
    angles = [g.op("Mul", g.unsqueeze(g.cast(place, FLOAT), 1), frequencies) for place in (row, column)]
    return cos_sin(g, g.op("Concat", *angles, axis=-1))


def vision_block(g: GraphBuilder, config: VisionConfig, layer: int, x: str, rope: tuple[str, str]) -> str:
    """x: [F, P, C]; attention stays within a frame."""
    root, heads, width = f"vision.blocks.{layer}", config.num_heads, config.head_dim
    qkv = g.linear(layer_norm(g, x, f"{root}.norm1"), f"{root}.qkv", bias=True)
    qk, v = g.split(g.reshape(qkv, 0, 0, 3 * heads, width), (2 * heads, heads), axis=2)
    qk = g.to_weights(rotate(g, g.to_float(qk), *rope, width))
    q, k = g.split(qk, (heads, heads), axis=2)
    mixed = attention(g, q, swap(g, k), swap(g, v), None, heads, heads, width)
    x = g.op("Add", x, g.linear(mixed, f"{root}.proj", bias=True))
    inner = g.linear(layer_norm(g, x, f"{root}.norm2"), f"{root}.fc1", bias=True)
    return g.op("Add", x, g.linear(g.op("Gelu", inner, approximate="tanh"), f"{root}.fc2", bias=True))


def patch_merger(g: GraphBuilder, config: VisionConfig, module: str, x: str, *, norm_after_fold: bool) -> str:
    """x: [F, P, C].  Returns fp32 [V, d], the visual tokens of all frames: merge x merge neighbours make one."""
    folded = config.hidden_size * config.spatial_merge_size**2
    if norm_after_fold:
        x = layer_norm(g, g.reshape(x, -1, folded), f"{module}.norm")
    else:
        x = g.reshape(layer_norm(g, x, f"{module}.norm"), -1, folded)
    inner = g.op("Gelu", g.linear(x, f"{module}.fc1", bias=True))
    return g.to_float(g.linear(inner, f"{module}.fc2", bias=True))
