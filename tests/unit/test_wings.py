"""The rules of the house: which wing imports which, how long a function and a file may be."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import lora_practice

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_practice"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
ENTRY_POINTS = ("fine_tuning_practice", "inference", "scripts", "upload_lora_to_hub", "examples")
WINGS = [line.split()[0] for line in (lora_practice.__doc__ or "").splitlines() if line.startswith("    ")]
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def module(path: Path) -> str:
    """lora_practice/data/readers.py -> data.readers; lora_practice/fast/__init__.py -> fast"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in full; of a `from` import each name that is a module."""
    here = ("lora_practice", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                below = ROOT / Path(*source.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield f"{source}.{alias.name}" if is_module else source


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    return {name.partition(".")[2] for name in imports(path) if name.startswith("lora_practice.")} - {""}


def assigned(node: ast.stmt) -> list[str]:
    """The names that an assignment gives a value, of `A, B = 1, 2` both; none of any other statement."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def test_the_listing_names_every_wing() -> None:
    inside = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(WINGS) == inside - {"__init__", "__pycache__"}


def test_a_file_imports_only_wings_above_its_own_line() -> None:
    wrong = []
    for path in FILES:
        wing = module(path).partition(".")[0]
        for other in ours(path):
            lower = other.partition(".")[0]
            if wing != "__init__" and lower != wing and (wing == "fast" or WINGS.index(lower) > WINGS.index(wing)):
                wrong.append(f"{module(path)} imports {other}")
    assert not wrong


def test_no_cycle_inside_a_wing() -> None:
    waits = {module(path): {one for one in ours(path) if one != module(path)} for path in FILES}
    while free := {name for name, below in waits.items() if not below & set(waits)}:
        waits = {name: below for name, below in waits.items() if name not in free}
    assert not waits


def test_the_fast_path_needs_torch_alone() -> None:
    theirs = {"transformers", "peft", "trl", "datasets", "accelerate"}
    for path in (PACKAGE / "fast").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & theirs, module(path)


def test_only_the_command_line_imports_an_entry_point() -> None:
    importers = {module(p) for p in FILES if any(name.partition(".")[0] in ENTRY_POINTS for name in imports(p))}
    assert importers == {"cli"}


def test_signatures_and_versions_are_asked_in_one_file() -> None:
    asking = {"inspect", "importlib.metadata", "packaging"}
    assert {module(path) for path in FILES if asking & set(imports(path))} == {"compat"}


def test_the_hubs_variables_are_read_where_the_environment_is_prepared() -> None:
    readers = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
                if any(name.startswith("HF_") and name != "HF_TOKEN" for name in names):
                    readers.add(module(path))
    assert readers <= {"sources.environment", "sources.dotenv_file"}


def test_what_is_public_has_a_docstring() -> None:
    silent = [module(p) for p, tree in TREES.items() if not ast.get_docstring(tree) and p.name != "__init__.py"]
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                silent += [] if ast.get_docstring(node) else [f"{module(path)}.{node.name}"]
    assert not silent


def test_a_public_name_is_defined_in_one_module() -> None:
    homes = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else assigned(node)
            for name in names:
                if not name.startswith("_"):
                    homes[name].add(module(path))
    commands = homes.pop("main")  # each entry point has one
    assert {name: where for name, where in homes.items() if len(where - {"cli"}) > 1} == {} and "cli" in commands


def test_a_function_fits_on_a_screen_and_a_file_is_one_subject() -> None:
    kernels = [*(PACKAGE / "fast" / "kernels").glob("*.cpp"), *(PACKAGE / "fast" / "kernels").glob("*.h")]
    assert kernels
    long = [path.name for path in kernels if len(path.read_text("utf-8").splitlines()) > LONGEST_FILE]
    scripts = [ROOT / "fine_tuning_practice.py", ROOT / "inference.py", *(ROOT / "examples").glob("*.py")]
    for path, tree in [*TREES.items(), *((one, ast.parse(one.read_text("utf-8"))) for one in scripts)]:
        too_long = path in TREES and len(path.read_text("utf-8").splitlines()) > LONGEST_FILE
        long += [path.name] if too_long else []  # an entry point also holds a table of settings
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                long += [node.name] if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION else []
    assert not long
