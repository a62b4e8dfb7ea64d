"""Settings that cannot be meant."""

from __future__ import annotations

import pytest

from vitalrt.cli import main
from vitalrt.errors import VitalError
from vitalrt.serve.settings import ServeConfig, read_api_keys


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("max_queue", 0),
        ("max_body_bytes", 1.5),
        ("drain_s", True),
        ("deadline_s", 0),
        ("deadline_s", float("nan")),
        ("model_name", "a/b"),
        ("model_name", "a@k=1"),
        ("alias_steps", (65,)),
        ("api_keys", ("short",)),
        ("api_keys", (" padded-with-blanks",)),
        ("audit_text", True),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(VitalError, match=field):
        ServeConfig(**{field: value})


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    assert ServeConfig().host == "127.0.0.1"


def test_keys_are_neither_shown_nor_lost(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# clinic\n\nsecret-number-one\n  secret-number-two  \n")
    config = ServeConfig(api_keys=read_api_keys(path))
    assert config.api_keys == ("secret-number-one", "secret-number-two")
    assert "secret" not in repr(config)
    path.write_text("# none\n")
    with pytest.raises(VitalError, match="no key"):
        read_api_keys(path)
    with pytest.raises(VitalError, match="cannot be read"):
        read_api_keys(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-queue", "0"],
        ["--api-keys", "/nowhere"],
        ["--allow-images-from", "example.org"],
        ["--audit", "/nowhere/audit.jsonl"],
        ["--name", "a b"],
        ["--audit-text"],
    ],
)
def test_the_command_names_what_it_cannot_use(capsys, arguments):
    assert main(["serve", "--cache-tokens", "64", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("vitalrt: ") and message.count("\n") == 1
