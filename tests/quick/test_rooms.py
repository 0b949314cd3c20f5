"""The house's own rules, held over the syntax trees: who may import whom, and how long a room may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_practice"
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = ("fine_tuning_practice", "inference", "scripts", "upload_lora_to_hub")
# A file imports lower layers only; inside one layer, only what stands before it on the same line.
LAYERS = [
    [
        "terminal",
        "errors",
        "helping",
        "settings",
        "verbs",
        "parameters",
        "stored",
        "manifest",
        "origin",
        "disk",
        "holding",
        "versions",
    ],
    ["memory", "cards", "probe", "trouble", "machine", "gguf_model", "environment", "embedded", "sources"],
    [
        *(
            "data.encodings",
            "data.rows",
            "data.json_rows",
            "data.files",
            "data.turns",
            "data.conversations",
            "data.collect",
        ),
        *(
            "data.meter",
            "data.bounds",
            "data.template",
            "data.tokens",
            "data.survey",
            "data.examples",
            "data.batches",
            "data.prepare",
            "resuming",
            "artifacts",
            "variants",
            "adapter_config",
            "adapter",
            "contents",
            "anatomy",
            "inventory",
            "judging",
            "inspecting",
        ),
    ],
    ["model"],
    ["curve", "figures", "pieces", "talker", "generate", "talk", "chat", "held_out", "compare", "record", "check"],
    [
        *("doctor.surroundings", "doctor.diagnosis", "doctor.passport"),
        *("report", "gguf_tokens", "gguf_write", "modelfile", "llama_cpp", "proof", "export"),
        *("hub.inspection", "hub.redaction", "hub.parcel", "hub.rights", "hub.link", "hub.upload"),
    ],
    [
        *("watch", "rewind", "verdict", "ladder", "guard", "trainer"),
        *("preflight", "planning", "evaluate", "train", "selftest"),
    ],
    ["cli"],
]
PLACE = {name: (level, order) for level, layer in enumerate(LAYERS) for order, name in enumerate(layer)}
LONGEST_FILE, LONGEST_FUNCTION = 250, 60


def room(path: Path) -> str:
    """lora_practice/data/tokens.py -> data.tokens"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in full; of a `from` import each name that is a module."""
    here = ("lora_practice", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                below = ROOT / Path(*module.split("."), alias.name)
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield f"{module}.{alias.name}" if is_module else module


def ours(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    found = {name.partition(".")[2] for name in imports(path) if name.startswith("lora_practice.")}
    return found - {""}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "fast"], ids=room)
def test_a_room_imports_lower_layers_only(path: Path) -> None:
    name = room(path)
    if path.name == "__init__.py":
        assert not ours(path)
        return
    assert name in PLACE, f"give {name} its layer"
    for other in ours(path):
        if other == "fast" or other.startswith("fast."):
            assert PLACE[name][0] > 2, f"{name} imports {other}"
            continue
        assert PLACE[other] < PLACE[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "fast").glob("*.py")), ids=room)
def test_the_fast_room_stands_alone(path: Path) -> None:
    assert all(name.startswith("fast") for name in ours(path))
    third_party = {name.partition(".")[0] for name in imports(path)} & {"transformers", "peft", "trl", "datasets"}
    assert not third_party


@pytest.mark.parametrize("path", FILES, ids=room)
def test_no_room_imports_a_door(path: Path) -> None:
    doors = {name for name in imports(path) if name.partition(".")[0] in DOORS}
    assert doors == ({"fine_tuning_practice", "inference"} if room(path) == "cli" else set())


def test_every_place_in_the_table_is_a_room() -> None:
    assert set(PLACE) == {room(p) for p in FILES if p.name != "__init__.py" and p.parent.name != "fast"}


def test_only_one_room_reads_the_hubs_variables() -> None:
    """HF_HOME and its kin steer libraries; one place reads them, so that one place can explain them."""
    readers = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            is_read = ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)] if is_read else []
            if any(name.startswith("HF_") and name != "HF_TOKEN" for name in names):
                readers.add(room(path))
    assert readers <= {"environment"}


def test_only_one_room_knows_how_versions_differ() -> None:
    """Signatures and versions are asked in one place, so that an upgrade is read in one place."""
    asking = {"inspect", "importlib.metadata", "packaging"}
    askers = {room(path) for path in FILES if asking & set(imports(path))}
    assert askers == {"versions"}


@pytest.mark.parametrize("path", FILES, ids=room)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    silent = [] if ast.get_docstring(tree) or path.name == "__init__.py" else ["the file itself"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            silent += [] if ast.get_docstring(node) else [node.name]
    assert not silent


@pytest.mark.parametrize("path", FILES, ids=room)
def test_a_room_fits_on_a_few_screens(path: Path) -> None:
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("path", sorted((PACKAGE / "fast").glob("*.[ch]*")), ids=lambda path: path.name)
def test_a_file_of_kernels_does_so_too(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST_FILE
