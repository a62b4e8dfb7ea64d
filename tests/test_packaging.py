"""What an installation must hold, whether editable or from a wheel."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_installed_version_is_the_declared_one() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert metadata.version("vitalrt") == declared


@pytest.mark.parametrize("name", ["vitalrt", "vitalrt_kernels", "vitalrt_training"])
def test_packages_import(name: str) -> None:
    assert importlib.import_module(name).__file__


def test_console_script_resolves() -> None:
    (script,) = metadata.distribution("vitalrt").entry_points.select(group="console_scripts", name="vitalrt")
    assert callable(script.load())


def test_bundled_files_are_found_beside_the_package() -> None:
    import vitalrt

    assets = Path(vitalrt.__file__).parent / "assets"
    assert list(assets.glob("**/*.safetensors"))


def test_runtime_imports_without_training() -> None:
    code = "import sys, vitalrt; sys.exit('vitalrt_training' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_sees_no_kernels_package() -> None:
    """The folder kernels/ holds sources; as an importable package it would be taken for the one transformers probes."""
    code = "from transformers.utils import is_kernels_available; import sys; sys.exit(is_kernels_available())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_stub_names_what_the_module_has() -> None:
    core = importlib.import_module("vitalrt._core")
    stub = ast.parse((ROOT / "vitalrt" / "_core.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {name for name in vars(core) if not name.startswith("_")}
    methods = {node.name for node in classes["BlockPool"].body if isinstance(node, ast.FunctionDef)}
    assert methods - {"__init__"} == {name for name in vars(core.BlockPool) if not name.startswith("_")}


def test_core_knows_neither_python_nor_torch() -> None:
    sources = [path for path in (ROOT / "csrc").glob("**/*.[ch]pp") if path.name != "bindings.cpp"]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if any(word in line for word in ("Python.h", "pybind11", "torch"))], path
