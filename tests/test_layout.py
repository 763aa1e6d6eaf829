"""The house in order: short functions, modules and scripts, imports that point one way.

What must be longer says why, in a comment of its own line that begins with "# Long:", in the
function or at the top of the module.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "llama_squad"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
OTHERS = sorted(p for name in ("benchmarks", "quickstart") for p in (ROOT / name).glob("*.py"))

FUNCTION_LINES, MODULE_LINES, SCRIPT_LINES = 50, 350, 120
REASON = "# Long:"


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def explained(lines: list[str]) -> bool:
    return any(line.strip().startswith(REASON) for line in lines)


def long_functions(text: str) -> Iterator[str]:
    """Yield the functions, docstrings included, that are too long and do not say why."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            if len(body) > FUNCTION_LINES and not explained(body):
                yield f"{node.name} ({len(body)} lines)"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS, *OTHERS], ids=lambda p: p.name)
def test_functions_are_short_or_say_why(path: Path) -> None:
    assert not list(long_functions(path.read_text(encoding="utf-8")))


def test_what_a_long_function_is() -> None:
    longest = "def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1)
    assert not list(long_functions(longest))
    assert list(long_functions(f"{longest}    x = 1\n")) == ["f (51 lines)"]
    assert not list(long_functions(f"{longest}    # Long: a table\n    x = 1\n"))


def test_modules_and_scripts_are_short_or_say_why() -> None:
    limits = dict.fromkeys([*MODULES, *OTHERS], MODULE_LINES) | dict.fromkeys(SCRIPTS, SCRIPT_LINES)
    found = {path: lines_of(path) for path in limits}
    assert not {
        path.name: len(lines)
        for path, lines in found.items()
        if len(lines) > limits[path] and not explained(lines[:40])
    }


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a module of it imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found & {name_of(module) for module in MODULES}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_first_lines_say_what_a_module_is_for(path: Path) -> None:
    """And the modules that its docstrings name are there."""
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    rooms = {name_of(module) for module in MODULES}
    for name in re.findall(r"``(llama_squad(?:\.\w+)+)", text):
        assert rooms & {name, name.rpartition(".")[0]} - {"llama_squad"}, name


def test_no_module_imports_one_that_imports_it() -> None:
    """Not even inside a function."""
    package = "llama_squad"  # whose __init__ gives its names only when they are asked for
    graph = {name_of(path): imports(path) - {package} for path in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("llama_squad.answers") < order.index("llama_squad.evaluation")


@pytest.mark.slow
def test_rooms_that_load_neither_trl_nor_datasets() -> None:
    code = "import sys"
    for room in ("decoding", "predictors"):
        names = [name_of(path) for path in sorted((PACKAGE / room).glob("*.py"))]
        assert len(names) > 5
        code += f"\nimport {', '.join(names)}"
        code += f"\nprint({room!r}, {{'trl', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "decoding set()\npredictors set()\n", done.stdout + done.stderr
