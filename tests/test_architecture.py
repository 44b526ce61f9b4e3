"""The arrows hold: search -> actors and never back, no torch in the driver, nothing happens at import."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import actors
import search
from search.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SEARCH_MODULES = sorted(module.name for module in pkgutil.walk_packages(search.__path__, "search."))
STUDY_CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("cluster"))

IMPORT_AND_LOOK = """
import importlib, json, signal, sys, threading
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import ray
print(json.dumps({
    "modules": sorted(sys.modules),
    "ray": ray.is_initialized(),
    "threads": [thread.name for thread in threading.enumerate()],
    "signals": handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
}))
"""


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_driver_imports_no_torch_and_starts_nothing(tmp_path: Path) -> None:
    assert {"search.cli", "search.study", "search.pool"} <= set(SEARCH_MODULES)
    seen = json.loads(run_python(IMPORT_AND_LOOK, json.dumps(SEARCH_MODULES), cwd=tmp_path))
    assert set(SEARCH_MODULES) <= set(seen["modules"])
    assert {"torch", "transformers"} & set(seen["modules"]) == set()
    assert not seen["ray"]
    assert seen["threads"] == ["MainThread"]
    assert seen["signals"]
    assert list(tmp_path.iterdir()) == []


def test_checking_a_config_imports_no_torch(tmp_path: Path) -> None:
    """The check reads local texts to tell whether they are long enough."""
    (tmp_path / "text.txt").write_text("many words\n" * 1000)
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("{study: x, model: {source: ./model}, text: {source: ./text.txt}}")
    code = (
        "import sys; from pathlib import Path; from search.config import load_config;"
        "load_config(Path('config.yaml')); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run_python(code, cwd=tmp_path).split() == ["False", "False"]


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level if node.level else (node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value.partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def test_the_search_for_imports_sees_lazy_ones() -> None:
    hidden = "def f():\n  from search.config import x\n  import a.b\n  importlib.import_module('c.d')\n"
    assert imported(ast.parse(hidden)) == {"search", "a", "c"}


@pytest.mark.parametrize("path", sorted(Path(actors.__path__[0]).rglob("*.py")), ids=lambda p: p.name)
def test_workers_never_import_the_driver(path: Path) -> None:
    found = imported(ast.parse(path.read_text(encoding="utf-8")))
    assert found & {"search", "optuna"} == set()
    assert not any(name.startswith(".") for name in found), "write absolute imports: this test reads them"


def test_every_package_is_installed() -> None:
    """An editable install finds a package that is missing here; a wheel does not hold it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for name in ("search", "actors") for path in (ROOT / name).rglob("*.py")}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


@pytest.mark.parametrize("path", STUDY_CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_right(path: Path) -> None:
    config = load_config(path)
    assert config.study == path.stem


def test_there_are_shipped_configs() -> None:
    assert [path.name for path in STUDY_CONFIGS]
