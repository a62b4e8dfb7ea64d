"""The scaffolding of training: text decoder, pj_in and visual projector. Absent at inference; put back to explain.

N samples, K latent steps, d backbone width, v feature width of the vision encoder, e width of the text decoder,
L tokens of a reasoning step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vitalrt.config import SCAFFOLD_CONFIG, SCAFFOLD_WEIGHTS, read_json
from vitalrt.errors import CheckpointError, VitalError
from vitalrt_kernels.latent_projector import ProjectorWeights, latent_projector

PROJECTORS = ("linear", "mlp", "mlp_ln", "res_mlp_ln", "transformer")
DROPOUT = 0.1
SUPERVISED = ("text", "visual")
"""Losses that train scaffolding; which of them did is told with it, for what was not trained shows nothing."""
_KEYS = {"projector", "width", "feature_width", "supervised", "text_decoder"}


class VisualProjector(nn.Module):
    """z [..., d] to the vision encoder's feature space [..., v], in the five variants of VITAL table 13.

    linear: W2 z.  mlp: W2 drop(gelu(W1 z)).  mlp_ln: LN(W2 drop(gelu(W1 LN(z)))).
    res_mlp_ln (equation 5, the default): LN(W2 (drop(gelu(W1 LN(z))) + z)); the residual adds the raw z.
    transformer: LN(W2 block(z)), one pre-norm transformer block over the sample's own latents [N, K, d].
    """

    def __init__(self, variant: str, width: int, feature_width: int) -> None:
        super().__init__()
        if variant not in PROJECTORS:
            raise VitalError(f"projector: expected one of {PROJECTORS}, got {variant!r}")
        self.variant = variant
        self.output = nn.Linear(width, feature_width, bias=False)
        if variant in ("mlp", "mlp_ln", "res_mlp_ln"):
            self.hidden = nn.Linear(width, width, bias=False)
            self.dropout = nn.Dropout(DROPOUT)
        if variant in ("mlp_ln", "res_mlp_ln"):
            self.norm_in = nn.LayerNorm(width)
        if variant == "transformer":
            heads = max(1, width // 64)
            self.block = nn.TransformerEncoderLayer(
                width, heads, 4 * width, DROPOUT, "gelu", batch_first=True, norm_first=True
            )
        if variant in ("mlp_ln", "res_mlp_ln", "transformer"):
            self.norm_out = nn.LayerNorm(feature_width)
            # As long as its target, a unit vector. Were the projection sqrt(v) times longer, the gradient of an L1
            # distance would be its own sign, whatever the target, until this weight has shrunk.
            nn.init.constant_(self.norm_out.weight, feature_width**-0.5)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z: [N, K, d].  Step k sees z_1..z_k only, so that a step's projection does not depend on how many follow."""
        if self.variant == "linear":
            return self.output(z)
        if self.variant == "transformer":
            causal = nn.Transformer.generate_square_subsequent_mask(z.shape[1], z.device, z.dtype)
            return self.norm_out(self.output(self.block(z, src_mask=causal, is_causal=True)))
        if self.variant == "res_mlp_ln":
            return self._fused(z)
        hidden = self.hidden(z if self.variant == "mlp" else self.norm_in(z))
        projected = self.output(self.dropout(nn.functional.gelu(hidden)))
        return projected if self.variant == "mlp" else self.norm_out(projected)

    def _fused(self, z: torch.Tensor) -> torch.Tensor:
        norm_in, norm_out = self.norm_in, self.norm_out
        weights = ProjectorWeights(
            norm_in.weight, norm_in.bias, self.hidden.weight, self.output.weight, norm_out.weight, norm_out.bias
        )
        rows = z.to(norm_in.weight.dtype).flatten(0, -2).contiguous()
        dropout = self.dropout.p if self.training else 0.0
        seed = int(torch.randint(2**63 - 1, ())) if dropout else 0  # from torch's generator, so that a run resumes
        projected = latent_projector(rows, weights, norm_in.eps, dropout, seed)
        return projected.view(*z.shape[:-1], -1)


class Scaffold(nn.Module):
    """text_decoder: any Hugging Face causal LM, on its own embeddings; its config names the token that ends a step.
    pj_in: [d] to [e], with bias.  supervised: which of SUPERVISED trained it."""

    def __init__(
        self, projector: VisualProjector, pj_in: nn.Linear, text_decoder: Any, supervised: Sequence[str]
    ) -> None:
        super().__init__()
        self.projector = projector
        self.pj_in = pj_in
        self.text_decoder = text_decoder
        self.supervised = tuple(supervised)

    @classmethod
    def build(
        cls,
        variant: str,
        width: int,
        feature_width: int,
        text_decoder: Any,
        supervised: Sequence[str] = SUPERVISED,
    ) -> Scaffold:
        pj_in = nn.Linear(width, text_decoder.config.get_text_config().hidden_size)
        return cls(VisualProjector(variant, width, feature_width), pj_in, text_decoder, supervised)

    def text_logits(self, z: torch.Tensor, chain_ids: torch.Tensor) -> torch.Tensor:
        """Decoder([pj_in(z_k); Embed(e_k)]), teacher-forced.

        z: [N, K, d].  chain_ids: [N, K, L], negative where padded (on the right).  Returns [N, K, L, vocab]: position l
        predicts token l of e_k, the first from pj_in(z_k) alone.
        """
        embed = self.text_decoder.get_input_embeddings()
        tokens = embed(chain_ids[..., :-1].clamp(min=0))
        inputs = torch.cat((self.pj_in(z)[:, :, None].to(tokens.dtype), tokens), dim=2)
        logits = self.text_decoder(inputs_embeds=inputs.flatten(0, 1), use_cache=False).logits
        logits = logits.unflatten(0, chain_ids.shape[:2])
        return logits[:, :, : chain_ids.shape[2]]  # where L is 0, pj_in(z_k) has nothing to predict

    def save(self, directory: Path) -> None:
        """scaffold.safetensors and scaffold.json, beside the checkpoint's own files."""
        config = {
            "projector": self.projector.variant,
            "width": self.pj_in.in_features,
            "feature_width": self.projector.output.out_features,
            "supervised": list(self.supervised),
            "text_decoder": self.text_decoder.config.to_dict(),
        }
        (directory / SCAFFOLD_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        tied = _tied_weights(self.text_decoder)
        weights = {
            name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items() if name not in tied
        }
        save_file(weights, directory / SCAFFOLD_WEIGHTS)

    @classmethod
    def load(cls, directory: Path) -> Scaffold:
        """float32, on the CPU.  Raises CheckpointError if the directory has no scaffold or its tensors do not fit."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if not all((directory / name).is_file() for name in (SCAFFOLD_CONFIG, SCAFFOLD_WEIGHTS)):
            raise CheckpointError(
                f"scaffold: {directory} has no {SCAFFOLD_CONFIG} and {SCAFFOLD_WEIGHTS}; it was saved without"
                " scaffolding"
            )
        config = read_json(directory / SCAFFOLD_CONFIG, "scaffold")
        if set(config) != _KEYS:
            came = f"expected keys {sorted(_KEYS)}, got {sorted(config)}"
            raise CheckpointError(f"scaffold: {directory / SCAFFOLD_CONFIG}: {came}")
        if not isinstance(config["supervised"], list) or not set(config["supervised"]) <= set(SUPERVISED):
            came = f"supervised: expected a list of {SUPERVISED}, got {config['supervised']!r}"
            raise CheckpointError(f"scaffold: {directory / SCAFFOLD_CONFIG}: {came}")
        with torch.random.fork_rng(devices=[]):  # weights are drawn, to be overwritten: nobody's seed is to move on
            try:
                decoder_config = AutoConfig.for_model(**config["text_decoder"])
                decoder = AutoModelForCausalLM.from_config(decoder_config, dtype=torch.float32)
                sizes = config["projector"], config["width"], config["feature_width"]
                scaffold = cls.build(*sizes, decoder, config["supervised"])
            except Exception as error:  # a garbled configuration may raise anything, ZeroDivisionError included
                reason = " ".join(str(error).split()) or type(error).__name__
                raise CheckpointError(f"scaffold: {directory / SCAFFOLD_CONFIG} cannot be built ({reason})") from error
        try:
            missing, unknown = scaffold.load_state_dict(load_file(directory / SCAFFOLD_WEIGHTS), strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:  # the second: of other shapes
            reason = " ".join(str(error).split())
            raise CheckpointError(f"scaffold: {directory / SCAFFOLD_WEIGHTS} cannot be read ({reason})") from error
        missing = sorted(set(missing) - _tied_weights(decoder))
        if unknown or missing:
            raise CheckpointError(f"scaffold: tensors missing {missing[:3]}, unknown {unknown[:3]}")
        decoder.tie_weights()
        return scaffold.eval().requires_grad_(False)


def _tied_weights(text_decoder: Any) -> set[str]:
    """Names, within a Scaffold, of its decoder's weights that are another's: not saved."""
    tied = getattr(text_decoder, "_tied_weights_keys", None) if text_decoder.config.tie_word_embeddings else None
    return {f"text_decoder.{name}" for name in tied or ()}
