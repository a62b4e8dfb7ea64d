"""A record of every request that reached the engine, one JSON line each."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitalrt.errors import VitalError
from vitalrt.inputs.prompt import Prompt

_DIGESTED = ("*.safetensors", "*.json", "*.jinja", "*.onnx", "*.onnx_data", "*.data")


class AuditLog:
    """Appends to a file that only its owner may read. Holds hashes in place of texts and images, unless texts were
    asked for. A hash of a short text can be guessed: keep the file as safe as the answers themselves.

    Raises VitalError if the file cannot be opened.
    """

    def __init__(self, path: Path, with_text: bool, model: dict[str, Any]) -> None:
        """model: what every line says of the weights."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise VitalError(f"audit_file: {path.name} cannot be opened ({error.strerror})") from error
        self._with_text = with_text
        self._model = model
        self._lock = threading.Lock()

    def write(
        self, request_id: str, prompt: Prompt, outcome: str, texts: dict[str, Any], answers: Sequence[str], **facts: Any
    ) -> None:
        """outcome: "done", or why there is no whole answer.  texts: written only if texts were asked for."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "outcome": outcome,
            **self._model,
            **facts,
            "input_sha256": input_digest(prompt),
            "image_sha256": [digest.hex() for digest in prompt.digests],
            "output_sha256": [hashlib.sha256(answer.encode()).hexdigest() for answer in answers],
        }
        if self._with_text:
            record |= {"texts": texts, "answers": list(answers)}
        with self._lock:  # a line in one piece, for other processes may append to the file too
            os.write(self._file, (json.dumps(record) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def input_digest(prompt: Prompt) -> str:
    """SHA-256 of what the model saw: token ids (little-endian int64), then the digest of each image."""
    digest = hashlib.sha256(prompt.input_ids.numpy().astype("<i8").tobytes())
    for image in prompt.digests:
        digest.update(image)
    return digest.hexdigest()


def directory_digest(directory: Path) -> str:
    """SHA-256 over names and contents of the files that make a model or an adapter."""
    files = sorted({file for pattern in _DIGESTED for file in directory.glob(pattern)})
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()
