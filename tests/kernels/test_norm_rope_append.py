from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitalrt.config import DecoderConfig
from vitalrt.model.rope import MRope
from vitalrt_kernels import rotate
from vitalrt_kernels.norm_rope_append import Rope, norm_rope_append, norm_rope_append_reference
from vitalrt_kernels.rms_norm import rms_norm_reference

SLOTS = 23
CONFIG = DecoderConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(4, 2, 2),
    tie_word_embeddings=True,
)  # fmt: skip


def random_case(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str):
    torch.manual_seed(tokens)
    qkv = (3 * torch.randn(tokens, heads + 2 * kv_heads, head_dim)).to(device, dtype)
    norm = (1 + torch.randn(heads + kv_heads, head_dim) / 4).to(device, dtype)
    section = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)
    mrope = MRope(replace(CONFIG, head_dim=head_dim, mrope_section=section))
    rope = Rope(mrope.inverse_frequencies.to(device), mrope.axis_of_frequency.to(device))
    slots = torch.randperm(SLOTS)[:tokens].to(device)
    caches = torch.full((2, SLOTS, kv_heads, head_dim), float("nan"), device=device, dtype=dtype)
    return qkv, norm, 1e-6, torch.randint(0, 2**18, (3, tokens), device=device), rope, *caches, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 2, 128), (7, 6, 2, 32), (3, 5, 1, 10), (2, 3, 3, 22), (0, 4, 2, 8)])
def test_kernel(dtype, shape, device, assert_close) -> None:
    from vitalrt_kernels.gpu import norm_rope_append as gpu

    case = list(random_case(*shape, dtype, device))
    if shape[0] > 1:
        case[7][1] = -1
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case]
    exact[5], exact[6] = exact[5].clone(), exact[6].clone()
    q = gpu.norm_rope_append(*case)
    assert_close("norm_rope_append", q, norm_rope_append_reference(*exact))
    written = case[7][case[7] >= 0]
    others = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, written.cpu(), False)
    for cache, expected in zip(case[5:7], exact[5:7], strict=True):
        assert_close("norm_rope_append", cache[written], expected[written])
        assert bool(cache[others].isnan().all())
    if dtype != torch.bfloat16:
        assert torch.equal(case[6][written], case[0][case[7] >= 0, -shape[2] :])  # values are moved, not computed


def test_reference_is_the_decoders() -> None:
    qkv, norm, eps, positions, rope, k_cache, v_cache, slots = random_case(5, 4, 2, 16, torch.float32, "cpu")
    cos, sin = MRope(CONFIG)(positions, torch.float32)
    qk = rotate(rms_norm_reference(qkv[:, :6], norm, eps), cos, sin)
    q = norm_rope_append(qkv, norm, eps, positions, rope, k_cache, v_cache, slots)
    torch.testing.assert_close(q, qk[:, :4])
    torch.testing.assert_close(k_cache[slots], qk[:, 4:])
    assert torch.equal(v_cache[slots], qkv[:, 6:])


@pytest.mark.parametrize(
    ("index", "bad", "says"),
    [
        (0, torch.ones(5, 4, 16), "qkv, k_cache: expected"),
        (1, torch.ones(5, 16), "norm_weight: expected"),
        (3, torch.ones(3, 5), "positions: expected"),
        (3, torch.ones(5, dtype=torch.int64), "positions: expected"),
        (5, torch.ones(SLOTS, 2, 16).half(), "k_cache: expected"),
        (6, torch.ones(SLOTS + 1, 2, 16), "v_cache: expected"),
        (7, torch.ones(4, dtype=torch.int64), "slots: expected"),
        (7, torch.ones(5, dtype=torch.int32), "slots: expected"),
    ],
)
def test_bad_arguments(index: int, bad: torch.Tensor, says: str) -> None:
    case = list(random_case(5, 4, 2, 16, torch.float32, "cpu"))
    case[index] = bad
    with pytest.raises(ValueError, match=says):
        norm_rope_append(*case)
