"""The shape of the package: rooms in order, no cycles, a light front door, few public names."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import safeglasses
from safeglasses.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "safeglasses"
ORDER = [
    "errors", "files", "progress", "serving", "model", "data", "find", "defend", "tune", "ship", "measure",
    "protect", "report", "evals", "run", "cli",
]  # fmt: skip
FRONT = {"safeglasses", "safeglasses.__main__"}  # may name any room: the one lazily, the other to start
HEAVY = {"torch", "transformers", "peft", "numpy", "PIL", "datasets", "optuna", "plotly", "pyarrow", "scipy"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imports_of(name: str) -> set[str]:
    """Our modules that a module imports: at its top, in functions and for type checkers."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in SOURCES else str(node.module))
    return found & SOURCES.keys()


GRAPH = {name: imports_of(name) for name in SOURCES if name not in FRONT}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_import_cycles() -> None:
    TopologicalSorter({name: found - FRONT for name, found in GRAPH.items()}).prepare()  # raises CycleError


def test_rooms_import_only_earlier_rooms() -> None:
    assert {room(name) for name in GRAPH} == set(ORDER)
    wrong = [
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found - FRONT
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert wrong == []


def test_rooms_take_nothing_but_the_version_from_the_front_door() -> None:
    taken = {
        alias.name
        for name in GRAPH
        for node in ast.walk(SOURCES[name])
        if isinstance(node, ast.ImportFrom) and node.module == "safeglasses"
        for alias in node.names
        if f"safeglasses.{alias.name}" not in SOURCES
    }
    assert taken == {"__version__"}


def test_nothing_prints() -> None:
    calls = [
        f"{name}:{node.lineno}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_public_names_are_few_and_all_there() -> None:
    assert len(safeglasses.__all__) <= 26
    assert len(set(safeglasses.__all__)) == len(safeglasses.__all__)
    for name in safeglasses.__all__:
        assert getattr(safeglasses, name) is not None
    assert set(safeglasses.__all__) < set(dir(safeglasses))
    with pytest.raises(AttributeError, match="module 'safeglasses' has no attribute 'nonsense'"):
        _ = safeglasses.nonsense


def test_public_names_are_the_same_for_type_checkers() -> None:
    block = next(node for node in SOURCES["safeglasses"].body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == safeglasses._HOMES
    assert set(declared) == set(safeglasses.__all__)
    for name, home in declared.items():
        assert getattr(import_module(home), name) is not None


def test_version_is_the_changelogs() -> None:
    newest = re.search(r"^## \[([^]]+)]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == safeglasses.__version__
    assert f"version: {safeglasses.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


LIGHT = {
    "import": "import safeglasses",
    "help": "help_of()",
    **{verb.__name__: f"help_of({verb.__name__!r})" for verb in VERBS},
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_front_door_is_light(code: str) -> None:
    script = f"""
import json, sys
def help_of(*verb):
    from safeglasses.cli import execute
    assert execute([*verb, "--help"]) == 0
{code}
loaded = {{name.partition(".")[0] for name in sys.modules}}
sys.stderr.write(json.dumps(sorted(loaded & set({sorted(HEAVY)!r}))))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stderr) == []


def test_what_only_reads_results_starts_without_pytorch() -> None:
    script = """
import sys
import safeglasses.cli.tables, safeglasses.measure.compare, safeglasses.measure.results_reading
import safeglasses.report.html, safeglasses.report.stored
sys.exit({"torch", "transformers"} & set(sys.modules) != set())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_file_of_the_map_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    rooms = re.search(r"src/safeglasses/\n(.*?)\ndocs/", text, re.DOTALL)
    assert rooms is not None
    assert [line.split("/")[0].strip() for line in rooms[1].splitlines()] == [
        name for name in ORDER if (PACKAGE / name).is_dir()
    ]


def test_python_in_the_documents_uses_public_names_that_exist() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "safeglasses":
                    assert {alias.name for alias in node.names} <= set(safeglasses.__all__), document


def test_the_installed_command_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["safeglasses"].partition(":")
    assert callable(getattr(import_module(module), name))
