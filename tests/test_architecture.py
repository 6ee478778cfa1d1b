"""The shape of the code: which package may import which, how long a file may be, and where the environment may be read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "smartdiff_jax"
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    {"errors"},
    {"registry"},
    {"config"},
    {"kernels", "samplers", "cache", "evaluation"},
    {"sharding"},
    {"models"},
    {"weights"},
    {"stages"},
    {"engine"},
    {"training", "serve", "client"},
    {"cli_bench", "cli_eval", "cli_mesh", "cli_profile", "cli_ray"},
    {"cli_serve"},
    {"cli"},
    {"__main__"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


def _package(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("smartdiff_jax.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    package = _package(file)
    if package == "__init__":
        return
    for imported in _imports(file) - {package}:
        assert LEVEL[imported] < LEVEL[package], f"{file.relative_to(ROOT)} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 500


def test_no_behaviour_from_the_environment():
    # To set a variable, which a library reads, is not to read one.
    readers = [f for f in FILES if re.search(r'getenv|os\.environ(?!\["\w+"\] = )', f.read_text())]
    assert not readers


def test_two_readme_lines():
    readme = (ROOT.parent / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("pip install uv && uv run ")]
    assert len(lines) == 2 and "smartdiff generate" in lines[0] and "pytest" in lines[1]
