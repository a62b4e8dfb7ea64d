"""A run's state as whole tensors, however the processes share them: what one process saves, any number may load.

FSDP2 keeps a parameter, and the optimiser's moments of it, as a DTensor: each process holds a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vitalrt.errors import VitalError


def trainable_state(model: nn.Module, keep: bool) -> dict[str, torch.Tensor | None]:
    """What is trained, by name.  All processes call; those with keep=False gather but hold nothing."""
    return {name: _whole(p.detach(), keep) for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Before the model is shared out.  Raises VitalError on the state of another one."""
    missing = {name for name, p in model.named_parameters() if p.requires_grad} - state.keys()
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if missing or unknown:
        raise VitalError(
            f"state: expected what this recipe trains; missing {sorted(missing)[:3]}, unknown {unknown[:3]}"
        )


def optimizer_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """All processes call, as above."""
    found = optimizer.state_dict()
    moments = {
        index: {name: _whole(value, keep) if torch.is_tensor(value) else value for name, value in of_parameter.items()}
        for index, of_parameter in found["state"].items()
    }
    return {"state": moments, "param_groups": found["param_groups"]}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _shared(value, parameters[index]) for name, value in of_parameter.items()}
        for index, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def _whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.cpu() if keep else None


def _shared(value: Any, parameter: torch.Tensor) -> Any:
    """A moment as its parameter is; a step count stays whole."""
    if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
        # Every process has read the whole of it: none has to be sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    return value
