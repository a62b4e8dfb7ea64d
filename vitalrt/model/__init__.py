"""Qwen3-VL as mathematics: weights and pure functions of tensors, no request state."""
