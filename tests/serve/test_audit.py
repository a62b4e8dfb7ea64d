"""The audit file: enough to check a claim about an answer, and nothing of a patient."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from vitalrt.errors import VitalError
from vitalrt.serve.audit import AuditLog, directory_digest, input_digest

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
QUESTION = "Where is the cyst?"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_tells_what_answered_what(phantom, serve, tmp_path):
    path = tmp_path / "audit.jsonl"
    with serve(phantom, audit_file=path) as running:
        whole = running.post(vital={"latent_steps": 2}, n=2)
        streamed = running.post(stream=True)
        running.post(temperature=9)  # never reached the engine
    first, second = lines_of(path)
    prompt = phantom.prepare(DEMO, QUESTION)
    answer = hashlib.sha256(b"lower left").hexdigest()
    assert first["request_id"] == whole.headers["x-request-id"] == whole.json()["id"]
    assert second["request_id"] == streamed.headers["x-request-id"]
    assert (first["model"], first["model_sha256"]) == ("phantom", directory_digest(phantom.checkpoint.directory))
    assert first["adapter_sha256"] is None
    assert first["precision"] == "float32"
    assert (first["k"], second["k"]) == (2, 4)
    assert first["output_sha256"] == [answer, answer]
    assert (first["outcome"], second["outcome"]) == ("done", "done")
    assert first["input_sha256"] == second["input_sha256"]
    assert len(first["image_sha256"]) == len(prompt.digests) == 1
    assert first["preprocessing"]["patches"]["patch_size"] == 8
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "cyst" not in path.read_text() and "left" not in path.read_text()


def test_texts_are_there_if_they_were_asked_for(phantom, serve, tmp_path):
    path = tmp_path / "audit.jsonl"
    with serve(phantom, audit_file=path, audit_text=True) as running:
        running.post()
    [line] = lines_of(path)
    assert line["texts"] == {"messages": [["user", QUESTION]]}
    assert line["answers"] == ["lower left"]
    assert "base64" not in path.read_text()


def test_a_request_that_ends_early_is_told_too(phantom, brake, serve, short_deadline_s, tmp_path):
    path = tmp_path / "audit.jsonl"
    with serve(phantom, audit_file=path, deadline_s=short_deadline_s) as running:
        running.post()
        running.post(stream=True)
    assert [line["outcome"] for line in lines_of(path)] == ["deadline_exceeded", "deadline_exceeded"]


def test_the_digest_of_an_input_follows_question_and_image(phantom):
    prompts = [
        phantom.prepare(DEMO, QUESTION),
        phantom.prepare(DEMO, "Where?"),
        phantom.prepare(bytes(DEMO.read_bytes()), QUESTION),
        phantom.prepare(None, QUESTION),
    ]
    digests = [input_digest(prompt) for prompt in prompts]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3


def test_the_digest_of_a_directory_follows_names_and_contents(tmp_path):
    def digest_of(**files: str) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.json").write_text(text)
        return directory_digest(tmp_path)

    assert digest_of(a="1", b="2") == digest_of(b="2", a="1")
    assert len({digest_of(a="1"), digest_of(a="2"), digest_of(b="1"), digest_of(a="1", b="")}) == 4


def test_a_file_that_cannot_be_opened_is_an_error_at_the_start(tmp_path):
    with pytest.raises(VitalError, match="audit_file"):
        AuditLog(tmp_path / "missing" / "audit.jsonl", False, {})
