"""Everything a server is told when it starts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.errors import VitalError


@dataclass(frozen=True)
class ServeConfig:
    """Sizes in what their names say; a request beyond a limit is refused before the engine works on it.

    model_name: what /v1/models calls the model; None: its directory's name.
    alias_steps: `name@k=K` is listed for these K; any K from 0 to 64 is understood.
    api_keys: any of them opens the server; none: everybody may ask.
    image_origins: where images may be fetched from (see remote.Fetcher); none: only data URIs.
    max_queue: answers that wait for the engine, beside those that run.
    deadline_s: from the request's arrival to its last byte.  drain_s: how long running answers may go on after SIGTERM.
    max_image_pixels: of one image as it comes, before it is resized.
    max_prompt_tokens: text and images together.  default_max_tokens: for requests that name no limit.
    audit_file: one JSON line is appended per request that reached the engine; with audit_text it holds the texts too.
    Raises VitalError on values out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    alias_steps: tuple[int, ...] = (0, 1, 2, 4)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    image_origins: tuple[str, ...] = ()
    max_queue: int = 64
    deadline_s: float = 120
    drain_s: int = 30
    max_body_bytes: int = 32 << 20
    max_images: int = 8
    max_image_pixels: int = 1 << 24
    max_text_chars: int = 100_000
    max_prompt_tokens: int = 8192
    max_completion_tokens: int = 1024
    default_max_tokens: int = 256
    max_choices: int = 8
    audit_file: Path | None = None
    audit_text: bool = False

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            lowest = 0 if setting.name in ("port", "max_images") else 1
            if setting.type == "int" and (type(value) is not int or value < lowest):
                raise VitalError(f"{setting.name}: expected a whole number from {lowest}, got {value!r}")
            if setting.name == "deadline_s" and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise VitalError(f"{setting.name}: expected a number of seconds above 0, got {value!r}")
        if self.model_name is not None and not re.fullmatch(r"[\w.-]+", self.model_name):
            raise VitalError(f"model_name: expected letters, digits, '.', '_' and '-', got {self.model_name!r}")
        if not all(0 <= k <= MAX_LATENT_STEPS for k in self.alias_steps):
            raise VitalError(f"alias_steps: expected numbers 0..{MAX_LATENT_STEPS}, got {list(self.alias_steps)}")
        if not all(key.strip() == key and key.isascii() and len(key) >= 8 for key in self.api_keys):
            raise VitalError("api_keys: expected ASCII keys of at least 8 characters without blanks around them")
        if self.audit_text and self.audit_file is None:
            raise VitalError("audit_text: expected together with audit_file")


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that start with # do not count.  Raises VitalError, without a key in it."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise VitalError(f"api_keys: {path.name} cannot be read ({type(error).__name__})") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise VitalError(f"api_keys: {path.name} holds no key")
    return keys
