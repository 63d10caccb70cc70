"""The floors of the house: imports point down, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_scaling"

# Each floor may import from itself and from the floors below it, of which the first line is the lowest.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("paths",),
    ("ops", "parallel"),
    ("models", "optim", "data", "losses"),
    ("scaling", "interop"),
    ("config",),
    ("step", "checkpoint", "telemetry", "figures"),
    ("evaluators",),
    ("workdirs", "runner", "sweep", "planner", "grid", "pretrained", "cards", "measure"),
    ("loop",),
    ("cli",),
    ("train", "evaluate", "plan", "study", "costs", "prepare", "weights", "explore"),
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
DOORS = set(FLOORS[-1])

# Rooms of one floor see each other only where a floor is one subject.
STRANGERS = {("ops", "parallel"), ("parallel", "ops"), ("models", "optim"), ("models", "data"), ("optim", "data"),
             ("optim", "models"), ("data", "models"), ("data", "optim")}  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vit_scaling":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vit_scaling.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    assert own in LEVEL, f"{own} stands on no floor: add it to FLOORS"
    for other in imported_rooms(path) - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{path.name} of {own} imports {other}, which is above it"
        assert (own, other) not in STRANGERS, f"{own} must not know {other}"
        assert other not in DOORS, f"{path.name} imports the door {other}"
    if own == "models":
        text = path.read_text()
        assert "parallel.mesh" not in text, "models know `constrain` and no mesh"


def test_only_doors_import_the_loop() -> None:
    importers = {room(path) for path in FILES if "loop" in imported_rooms(path)}
    assert importers <= DOORS


def test_importing_starts_no_device_and_no_tensorflow() -> None:
    modules = [
        "vit_scaling." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in FILES
        if path.name != "__init__.py" and room(path) not in DOORS
    ]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an import started a device'\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_left_without_a_word(path: Path) -> None:
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), f"{path} says nothing of what it is for"
