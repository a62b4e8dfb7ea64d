"""The graphs of an export: names, shapes and types as docs/onnx.md lists them.

B batch, T longest prompt, S cache capacity, K latent steps, V visual tokens, N deepstack levels, d width,
G key/value heads, D head dim; F frames of one size, P patches of a frame.
All hidden states, features and logits are fp32 at the borders; only the cache has the weights' type.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import ModelProto, TensorProto

from vitalrt.config import ModelConfig
from vitalrt.export import layers
from vitalrt.export.builder import Dims, GraphBuilder
from vitalrt.export.layers import FLOAT, INT64
from vitalrt.export.weights import WeightLayout
from vitalrt.model.rope import MRope

Cache = list[tuple[str, str]]  # keys and values of each layer, [B, G, S, D]


def build(config: ModelConfig, layout: WeightLayout, opset: int) -> dict[str, ModelProto]:
    """Every graph by its file name."""
    kinds: dict[str, Callable[[GraphBuilder, ModelConfig], None]] = {
        "vision": vision,
        "prefill": prefill,
        "latent_step": latent_step,
        "decode_step": decode_step,
        "latent_loop": latent_loop,
        "head": head,
    }
    models = {}
    for name, fill in kinds.items():
        g = GraphBuilder(layout)
        fill(g, config)
        models[f"{name}.onnx"] = g.model(name, opset)
    return models


def vision(g: GraphBuilder, config: ModelConfig) -> None:
    """pixel_values, grid_hw -> image_features, deepstack."""
    tower, width = config.vision, config.decoder.hidden_size
    pixels = g.input("pixel_values", FLOAT, ["frames", "patches", tower.patch_dim])
    grid_hw = g.input("grid_hw", INT64, [2])
    row, column = layers.patch_places(g, g.size(pixels, 1), grid_hw, tower.spatial_merge_size)
    rope = layers.vision_rope(g, tower, row, column)
    x = g.linear(g.to_weights(pixels), "vision.patch_embed", bias=True)
    x = g.op("Add", x, layers.place_embedding(g, tower, row, column, grid_hw))
    levels = []
    for layer in range(tower.depth):
        x = layers.vision_block(g, tower, layer, x, rope)
        if layer in tower.deepstack_visual_indexes:
            module = f"vision.deepstack_mergers.{tower.deepstack_visual_indexes.index(layer)}"
            levels.append(g.unsqueeze(layers.patch_merger(g, tower, module, x, norm_after_fold=True), 0))
    features = layers.patch_merger(g, tower, "vision.merger", x, norm_after_fold=False)
    g.output("image_features", features, FLOAT, ["visual_tokens", width])
    if levels:
        g.output("deepstack", g.op("Concat", *levels, axis=0), FLOAT, [len(levels), "visual_tokens", width])


def prefill(g: GraphBuilder, config: ModelConfig) -> None:
    """input_ids, positions, lengths, image_features, deepstack, capacity -> hidden (z_0), present.*.

    Prompts are padded on the right: what is causal never looks at padding, and later steps overwrite its cache slots.
    """
    decoder = config.decoder
    num_levels, width = len(config.vision.deepstack_visual_indexes), decoder.hidden_size
    ids = g.input("input_ids", INT64, ["batch", "tokens"])
    positions = g.input("positions", INT64, [3, "batch", "tokens"])
    lengths = g.input("lengths", INT64, ["batch"])
    features = g.input("image_features", FLOAT, ["visual_tokens", width])
    capacity = g.input("capacity", INT64, [1])

    is_image = g.op("Equal", ids, g.number(config.image_token_id, INT64))
    # Row 0 is a row of zeros, for text; visual token v is row v + 1.
    flat = g.reshape(g.cast(is_image, INT64), -1)
    counted = g.op("Mul", g.op("CumSum", flat, g.number(0, INT64)), flat)
    feature_row = g.op("Reshape", counted, g.op("Shape", ids))
    zero = g.op("Expand", g.number(0.0, FLOAT), g.ints(1, width))
    x = g.op("Gather", g.weight("decoder.embed.weight"), ids)
    seen = g.op("Gather", g.op("Concat", zero, features, axis=0), feature_row)
    x = g.op("Where", g.unsqueeze(is_image, 2), g.to_weights(seen), x)

    by_axis = g.op("Transpose", positions, perm=[1, 2, 0])
    turning = g.op("Gather", by_axis, g.constant(MRope(decoder).axis_of_frequency.numpy()), axis=2)
    rope = _rope(g, config, turning)
    num_tokens = g.size(ids, 1)
    token = g.arange(num_tokens)
    bias = _bias(g, g.op("LessOrEqual", g.unsqueeze(token, 0), g.unsqueeze(token, 1)))
    groups = decoder.num_attention_heads // decoder.num_key_value_heads
    bias = g.op("Tile", bias, g.ints(groups, 1))
    spare = g.op("Sub", capacity, num_tokens)
    dims = g.size(ids, 0), g.ints(decoder.num_key_value_heads), spare, g.ints(decoder.head_dim)
    # Zeros: steps mask what they have not written, and 0 times NaN would be NaN.
    unused = g.op("Expand", g.number(0.0), g.op("Concat", *dims, axis=0))
    cache: Cache = []

    def attend(layer: int, q: str, k: str, v: str) -> str:
        k, v = layers.swap(g, k), layers.swap(g, v)
        cache.append((g.op("Concat", k, unused, axis=2), g.op("Concat", v, unused, axis=2)))
        return _attention(g, config, q, k, v, bias)

    if num_levels:
        deepstack = g.input("deepstack", FLOAT, [num_levels, "visual_tokens", width])
    for layer in range(decoder.num_hidden_layers):
        x = layers.decoder_layer(g, decoder, layer, x, rope, attend)
        if layer < num_levels:
            level = g.op("Gather", deepstack, g.number(layer, INT64), axis=0)
            added = g.op("Gather", g.op("Concat", zero, level, axis=0), feature_row)
            x = g.op("Add", x, g.to_weights(added))
    last = g.unsqueeze(g.op("Sub", lengths, g.ints(1)), 1)
    hidden = _final_norm(g, config, g.op("GatherND", x, last, batch_dims=1))
    g.output("hidden", g.to_float(hidden), FLOAT, ["batch", width])
    _output_cache(g, config, cache)


def latent_step(g: GraphBuilder, config: ModelConfig) -> None:
    """hidden (z_{k-1}), positions, lengths, past.* -> next_hidden (z_k), present.*."""
    width = config.decoder.hidden_size
    previous = g.input("hidden", FLOAT, ["batch", width])
    positions, lengths = _step_inputs(g)
    hidden, cache = _step(g, config, g.to_weights(previous), positions, lengths, _input_cache(g, config))
    g.output("next_hidden", g.to_float(hidden), FLOAT, ["batch", width])
    _output_cache(g, config, cache)


def decode_step(g: GraphBuilder, config: ModelConfig) -> None:
    """token_ids, positions, lengths, past.* -> logits of the next token, present.*."""
    token_ids = g.input("token_ids", INT64, ["batch"])
    positions, lengths = _step_inputs(g)
    embedded = g.op("Gather", g.weight("decoder.embed.weight"), token_ids)
    hidden, cache = _step(g, config, embedded, positions, lengths, _input_cache(g, config))
    _output_logits(g, config, hidden)
    _output_cache(g, config, cache)


def latent_loop(g: GraphBuilder, config: ModelConfig) -> None:
    """hidden (z_0), steps, positions, lengths, past.* -> latents (z_1..z_K), logits of z_K, present.*.

    steps: each row's own number of latent steps; K is their maximum. A row that has done its steps keeps its state:
    what it still writes lands on the slot after its last token and is overwritten later.
    """
    decoder = config.decoder
    width = decoder.hidden_size
    first = g.to_weights(g.input("hidden", FLOAT, ["batch", width]))
    steps = g.input("steps", INT64, ["batch"])
    positions, lengths = _step_inputs(g)
    past = _input_cache(g, config)

    body = GraphBuilder(g.layout, outer=g)
    step = body.input("step", INT64, [])
    body.input("go", TensorProto.BOOL, [])
    hidden = body.input("loop_hidden", g.layout.data_type, ["batch", width])
    done = body.input("loop_done", INT64, ["batch"])
    loop_past = _input_cache(body, config, "loop_past")
    position, length = (body.op("Add", start, done) for start in (positions, lengths))
    new_hidden, cache = _step(body, config, hidden, position, length, loop_past)
    is_thinking = body.op("Less", step, steps)
    kept = body.op("Where", body.unsqueeze(is_thinking, 1), new_hidden, hidden)
    body.output("loop_go", body.cast(body.number(1, INT64), TensorProto.BOOL), TensorProto.BOOL, [])
    body.output("loop_next_hidden", kept, g.layout.data_type, ["batch", width])
    next_done = body.op("Add", done, body.cast(is_thinking, INT64))
    body.output("loop_next_done", next_done, INT64, ["batch"])
    _output_cache(body, config, cache, "loop_present")
    body.output("latent", body.to_float(body.op("Identity", kept)), FLOAT, ["batch", width])

    count = g.op("ReduceMax", steps)
    none = g.op("Sub", lengths, lengths)
    flat = [name for pair in past for name in pair]
    last, _, *present, latents = g.ops(
        3 + len(flat), "Loop", g.op("Squeeze", count), "", first, none, *flat, body=body.graph("latent_step")
    )
    # A loop without a single step does not know the shape of what it did not make.
    latents = g.reshape(latents, count, g.size(steps, 0), width)
    g.output("latents", latents, FLOAT, ["steps", "batch", width])
    _output_logits(g, config, last)
    _output_cache(g, config, list(zip(present[::2], present[1::2], strict=True)))


def head(g: GraphBuilder, config: ModelConfig) -> None:
    """hidden -> logits: what a driver of latent_step needs for the first answer token."""
    hidden = g.input("hidden", FLOAT, ["batch", config.decoder.hidden_size])
    _output_logits(g, config, g.to_weights(hidden))


def _step(g: GraphBuilder, config: ModelConfig, x: str, positions: str, lengths: str, past: Cache) -> tuple[str, Cache]:
    """One token per row.  x: [B, d].  Returns the hidden state after the final norm [B, d] and the new cache.

    Keys and values go to slot lengths[b]; where past and present are one buffer, nothing else is touched.
    """
    decoder = config.decoder
    rope = _rope(g, config, g.unsqueeze(positions, 1, 2))
    slot = g.unsqueeze(lengths, 1, 2, 3)
    one_token = g.op("Concat", g.size(x, 0), g.ints(decoder.num_key_value_heads, 1, decoder.head_dim), axis=0)
    slots = g.op("Expand", slot, one_token)
    bias = _bias(g, g.op("LessOrEqual", g.arange(g.size(past[0][0], 2)), slot))
    cache: Cache = []

    def attend(layer: int, q: str, k: str, v: str) -> str:
        k, v = (
            g.op("ScatterElements", old, slots, layers.swap(g, new), axis=2)
            for old, new in zip(past[layer], (k, v), strict=True)
        )
        cache.append((k, v))
        return _attention(g, config, q, k, v, bias)

    x = g.unsqueeze(x, 1)
    for layer in range(decoder.num_hidden_layers):
        x = layers.decoder_layer(g, decoder, layer, x, rope, attend)
    return _final_norm(g, config, g.op("Squeeze", x, g.ints(1))), cache


def _rope(g: GraphBuilder, config: ModelConfig, positions: str) -> tuple[str, str]:
    cos, sin = layers.mrope(g, config.decoder, positions)
    return g.to_weights(cos), g.to_weights(sin)


def _attention(g: GraphBuilder, config: ModelConfig, q: str, k: str, v: str, bias: str) -> str:
    decoder = config.decoder
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    return layers.attention(g, q, k, v, bias, heads, kv_heads, decoder.head_dim)


def _bias(g: GraphBuilder, allowed: str) -> str:
    """fp32: 0 where attention may look, else minus infinity."""
    return g.op("Where", allowed, g.number(0.0, FLOAT), g.number(float("-inf"), FLOAT))


def _final_norm(g: GraphBuilder, config: ModelConfig, x: str) -> str:
    return layers.rms_norm(g, x, "decoder.norm.weight", config.decoder.rms_norm_eps)


def _step_inputs(g: GraphBuilder) -> tuple[str, str]:
    """positions: the next M-RoPE position of each row.  lengths: how many tokens of it are in the cache."""
    return g.input("positions", INT64, ["batch"]), g.input("lengths", INT64, ["batch"])


def _output_logits(g: GraphBuilder, config: ModelConfig, hidden: str) -> None:
    logits = layers.logits(g, config.decoder, hidden)
    g.output("logits", logits, FLOAT, ["batch", config.decoder.vocab_size])


def _cache_dims(config: ModelConfig) -> Dims:
    return ["batch", config.decoder.num_key_value_heads, "capacity", config.decoder.head_dim]


def _input_cache(g: GraphBuilder, config: ModelConfig, prefix: str = "past") -> Cache:
    def add(layer: int, kind: str) -> str:
        return g.input(f"{prefix}.{layer}.{kind}", g.layout.data_type, _cache_dims(config))

    return [(add(layer, "key"), add(layer, "value")) for layer in range(config.decoder.num_hidden_layers)]


def _output_cache(g: GraphBuilder, config: ModelConfig, cache: Cache, prefix: str = "present") -> None:
    for layer, pair in enumerate(cache):
        for kind, value in zip(("key", "value"), pair, strict=True):
            g.output(f"{prefix}.{layer}.{kind}", value, g.layout.data_type, _cache_dims(config))
