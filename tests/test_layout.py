"""The house keeps its rooms apart: who may import whom, and one stem per op in every room."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room may import of the project itself. A room may always import from inside itself, and every
# room may import the two bottom-level modules.
BOTTOM = {"pinclip.errors", "pinclip.io", "pinclip.tables"}
MAY_IMPORT = {
    "pinclip_kernels": set(),
    "pinclip.reference": set(),
    "pinclip.ops": {"pinclip.reference", "pinclip_kernels"},
    "pinclip.distributed": set(),
    "pinclip.models": {"pinclip.ops"},
    "pinclip.losses": {"pinclip.ops", "pinclip.distributed"},
    "pinclip.graph": {"pinclip.ops"},
    "pinclip.data": {"pinclip.graph", "pinclip.ops", "pinclip.distributed"},
    "pinclip.retrieval": {
        "pinclip.data",
        "pinclip.graph",
        "pinclip.models",
        "pinclip.ops",
        "pinclip.distributed",
    },
    "pinclip.train": {
        "pinclip.data",
        "pinclip.graph",
        "pinclip.retrieval",
        "pinclip.models",
        "pinclip.losses",
        "pinclip.ops",
        "pinclip.distributed",
    },
    "pinclip.cli": {
        "pinclip.data",
        "pinclip.graph",
        "pinclip.retrieval",
        "pinclip.train",
        "pinclip.distributed",
    },
    "train": {"pinclip.cli"},
}
# Libraries that only one place may know.
ONLY_IN = {
    "deepspeed": {"pinclip.train.engine"},
    "faiss": {"pinclip.retrieval.index"},
    "transformers": {"pinclip.integrations.transformers"},
    "timm": {"pinclip.integrations.timm"},
    "open_clip": {"pinclip.integrations.open_clip"},
}
FOLDERS = {"pinclip": ROOT / "pinclip", "pinclip_kernels": ROOT / "kernels" / "pinclip_kernels"}


def _modules():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path
    yield "train", ROOT / "train.py"


def _room(module):
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pinclip" else parts[0]


def _imports(path, module):
    """Absolute names of everything that the file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level] if path.name != "__init__.py" else module.split(".")
                base = ".".join([*above, base] if base else above)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


MODULES = list(_modules())


def test_the_walk_finds_the_house():
    names = {name for name, _ in MODULES}
    assert {
        "pinclip.cli",
        "pinclip.ops.attention",
        "pinclip.train.engine",
        "pinclip_kernels.extension",
    } <= names


@pytest.mark.parametrize("module,path", MODULES, ids=[name for name, _ in MODULES])
def test_import_law(module, path):
    room = _room(module)
    if room in BOTTOM or module == "pinclip":
        allowed = set()
    else:
        assert room in MAY_IMPORT, f"{path} is in no room of the house"
        allowed = MAY_IMPORT[room]
    for name, line in _imports(path, module):
        target = _room(name)
        if name.split(".")[0] not in ("pinclip", "pinclip_kernels", "tests", "bench", "train"):
            continue
        fine = target == room or target in BOTTOM or target in allowed or name == "pinclip"
        assert fine, f"{path}:{line}: {room} may not import {name}"


@pytest.mark.parametrize("module,path", MODULES, ids=[name for name, _ in MODULES])
def test_libraries_stay_in_their_room(module, path):
    for name, line in _imports(path, module):
        library = name.split(".")[0]
        assert module in ONLY_IN.get(library, {module}), f"{path}:{line}: {module} may not import {library}"


def test_reference_needs_torch_only():
    standard = set(sys.stdlib_module_names) | {"torch", "pinclip"}
    for module, path in MODULES:
        if _room(module) == "pinclip.reference":
            for name, line in _imports(path, module):
                assert name.split(".")[0] in standard, f"{path}:{line}: reference may not import {name}"


def test_collectives_are_issued_in_one_room():
    calls = re.compile(
        r"\bdist(?:ributed)?\.(all_|reduce|broadcast|gather|scatter|barrier|send|recv|isend|irecv)"
    )
    for module, path in MODULES:
        if _room(module) == "pinclip.distributed":
            continue
        code = path.read_text(encoding="utf-8")
        found = [
            m for m in calls.finditer(code) if "torch.distributed." in code[max(0, m.start() - 6) : m.end()]
        ]
        assert not found, f"{path} issues {found[0].group()}; only pinclip.distributed may"


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_one_stem_per_op_in_every_room():
    helpers = {"pairs"}  # what the ops share; a leading underscore says the same
    stems = {
        path.stem
        for path in (ROOT / "pinclip" / "ops").glob("*.py")
        if not path.stem.startswith("_") and path.stem not in helpers
    }
    assert {"attention", "contrastive", "sigmoid", "fusion_pack"} <= stems
    for stem in stems:
        assert (ROOT / "pinclip" / "reference" / f"{stem}.py").is_file(), f"{stem} has no reference"
        assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file(), f"{stem} has no test"
    for room in ("triton", "cuda", "cpu"):
        for path in (ROOT / "kernels" / "pinclip_kernels" / room).glob("*.py"):
            known = path.stem in stems or path.stem.startswith("_")
            assert known, f"{path} is the kernel of no op"
    for path in (ROOT / "csrc").glob("*.c*"):
        assert path.stem in stems | {"bindings"}, f"{path} is the source of no op"


def test_no_machine_in_the_project():
    """Nothing that is committed names a path of one machine."""
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|mnt)/\w")
    for folder in ("pinclip", "kernels", "csrc", "bench", "tests", "configs", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".toml", ".md", ".cpp", ".h", ".cu", ".j2"} and path != Path(__file__):
                found = pattern.search(path.read_text(encoding="utf-8"))
                assert not found, f"{path}: {found.group()}"
