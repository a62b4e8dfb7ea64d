"""The start of a step: what each sequence is fed, and its counters, moved on.

    x = z if it is still thinking, else embed[token];    angles = (length + offset) * frequencies;    length += 1

All that tells sequences apart is on the device, so that a step needs nothing from the host and one captured graph
serves rows of any phase. torch takes about ten launches for these few numbers; fused it is one.
B rows, d width, D head dim, E stop tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitalrt_kernels.backend import expect, runs_triton


class Rows(NamedTuple):
    """Where each sequence stands.  All [B] int32 but tokens; a row may stand idle.

    hidden: [B, d], what its last input gave.  tokens: int64, the newest one, of no meaning while it thinks.
    latents_left: latent steps to go.  lengths: its inputs in the cache.  limits: how many there may be; a row whose
    length has reached its limit is idle.  offsets: M-RoPE position less length.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    latents_left: torch.Tensor
    lengths: torch.Tensor
    limits: torch.Tensor
    offsets: torch.Tensor


class StepInputs(NamedTuple):
    """x: [B, d].  turns: [B, D] fp32, cosines and then sines of the angles by which halves of q and k are rotated.

    reach: [B] int32, the context to attend to, the new input included.  Of an idle row x, the angles and reach are 0.
    """

    x: torch.Tensor
    turns: torch.Tensor
    reach: torch.Tensor


def begin_step_reference(
    rows: Rows, embed: torch.Tensor, stop_ids: torch.Tensor, frequencies: torch.Tensor
) -> StepInputs:
    thinks = rows.latents_left > 0
    stops = ~thinks & torch.isin(rows.tokens, stop_ids)
    runs = (rows.lengths < rows.limits) & ~stops
    embedded = embed[torch.where(runs & ~thinks, rows.tokens, 0)]
    x = torch.where(thinks[:, None], rows.hidden, embedded).masked_fill(~runs[:, None], 0)
    angles = torch.where(runs, rows.lengths + rows.offsets, 0)[:, None].float() * frequencies
    rows.lengths.add_(runs.int())
    rows.latents_left.sub_((runs & thinks).int())
    rows.limits.masked_fill_(stops, 0)
    return StepInputs(x, torch.cat((angles.cos(), angles.sin()), dim=1), torch.where(runs, rows.lengths, 0))


def begin_step(rows: Rows, embed: torch.Tensor, stop_ids: torch.Tensor, frequencies: torch.Tensor) -> StepInputs:
    """Counters of rows that run are moved on in place; a row whose token is a stop token becomes idle for good.

    embed: [vocab, d], dtype of hidden.  stop_ids: [E] int64.  frequencies: [D/2] fp32, as in Rope.  All contiguous.
    rows.tokens of rows that answer: ids. Of a new token, all three position axes are the same.
    Raises ValueError on disagreeing shapes, dtypes or devices.
    """
    hidden = rows.hidden
    if hidden.ndim != 2 or embed.ndim != 2 or stop_ids.ndim != 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (hidden, embed, stop_ids))
        raise ValueError(f"hidden, embed, stop_ids: expected [B, d], [vocab, d], [E], got {shapes}")
    batch, device = len(hidden), hidden.device
    expect("hidden", hidden, hidden.shape, hidden.dtype, device)
    expect("tokens", rows.tokens, (batch,), torch.int64, device)
    for name in ("latents_left", "lengths", "limits", "offsets"):
        expect(name, getattr(rows, name), (batch,), torch.int32, device)
    expect("embed", embed, (len(embed), hidden.shape[1]), hidden.dtype, device)
    expect("stop_ids", stop_ids, stop_ids.shape, torch.int64, device)
    expect("frequencies", frequencies, (frequencies.numel(),), torch.float32, device)
    if runs_triton(hidden, embed):
        from vitalrt_kernels.gpu import begin_step as gpu

        return gpu.begin_step(rows, embed, stop_ids, frequencies)
    return begin_step_reference(rows, embed, stop_ids, frequencies)
