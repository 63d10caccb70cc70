"""Layers of the package: imports point down, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_scaling"

# Each layer may import from itself and from the layers below it; the first line is the lowest.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("names", "paths"),
    ("ops", "parallel"),
    ("models", "optim", "data"),
    ("flops", "laws", "interop"),
    ("config",),
    ("evaluation",),
    ("training",),
    ("planner", "studies"),
    ("pages",),
    ("cli",),
    ("train", "evaluate", "predict", "plan", "study", "costs", "prepare", "weights", "explore"),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
COMMANDS = set(LAYERS[-1])

# Packages of one layer that must not import each other.
STRANGERS = {("ops", "parallel"), ("parallel", "ops"), ("models", "optim"), ("models", "data"), ("optim", "data"),
             ("optim", "models"), ("data", "models"), ("data", "optim"), ("laws", "flops"), ("laws", "interop"),
             ("planner", "studies"), ("studies", "planner")}  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))


def package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vit_scaling":
            parts = node.module.split(".")
            packages |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vit_scaling.")}
    return packages - {"__version__", "UserError", "TransientError"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if package(path) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    own = package(path)
    assert own in LEVEL, f"{own} is in no layer: add it to LAYERS"
    for other in imported_packages(path) - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{path.name} of {own} imports {other}, which is above it"
        assert (own, other) not in STRANGERS, f"{own} must not know {other}"
        assert other not in COMMANDS, f"{path.name} imports the command {other}"
    if own == "models":
        text = path.read_text()
        assert "parallel.mesh" not in text, "models know `constrain` and no mesh"


def test_every_layer_exists() -> None:
    here = {package(path) for path in FILES} - {"__init__"}
    assert here == set(LEVEL)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_folder_says_which_question_it_answers(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert text, f"{folder}/__init__.py has no docstring"


def test_the_top_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 14  # nine commands, cli, config, names, paths and __init__
    assert (
        len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= 13
    )  # pages/ is the thirteenth: it shows what all others make


def test_importing_starts_no_device_and_no_tensorflow() -> None:
    modules = [
        "vit_scaling." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in FILES
        if path.name != "__init__.py" and package(path) not in COMMANDS
    ]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an import started a device'\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
