"""The one model of a server under its names: `name`, and `name@k=K` for a fixed number of latent steps."""

from __future__ import annotations

import re
import time

from vitalrt.api import Model
from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.engine.request import RESEARCH_NOTICE
from vitalrt.serve.errors import ApiError
from vitalrt.serve.protocol import ModelCard
from vitalrt.serve.settings import ServeConfig


class Catalog:
    """name: as configured, else the model directory's."""

    def __init__(self, model: Model, config: ServeConfig) -> None:
        directory = model.checkpoint.directory.resolve().name
        self.name = config.model_name or re.sub(r"[^\w.-]", "-", directory)
        self.default_k = model.checkpoint.vital.k
        self.max_model_len = model.checkpoint.config.decoder.max_position_embeddings
        self._alias_steps = config.alias_steps
        self._created = int(time.time())

    def alias_steps(self, model: str, param: str | None = "model") -> int | None:
        """K of `name@k=K`, None for the plain name.  Raises ApiError for any other."""
        if model == self.name:
            return None
        if model.startswith(f"{self.name}@"):
            found = re.fullmatch(r"k=([0-9]{1,2})", model.removeprefix(f"{self.name}@"), re.ASCII)
            if found and int(found[1]) <= MAX_LATENT_STEPS:
                return int(found[1])
        expected = f"expected {self.name} or {self.name}@k=K with K from 0 to {MAX_LATENT_STEPS}"
        raise ApiError(404, f"model: {expected}; see /v1/models", param=param, code="model_not_found")

    def card(self, model: str) -> ModelCard:
        """Raises ApiError for an unknown name."""
        steps = self.alias_steps(model, param=None)
        return ModelCard(
            id=model,
            created=self._created,
            root=self.name,
            parent=None if steps is None else self.name,
            max_model_len=self.max_model_len,
            k=self.default_k if steps is None else steps,
            notice=RESEARCH_NOTICE,
        )

    def cards(self) -> list[ModelCard]:
        return [self.card(name) for name in (self.name, *(f"{self.name}@k={k}" for k in self._alias_steps))]
