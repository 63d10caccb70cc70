"""Every command and every Python snippet of README.md and docs/, and every command in the docstrings of configs and
commands, in its cheapest form: parsed, shown, or traced.
"""

import ast
import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests import commands
from vit_scaling import UserError, cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_SH = (ROOT / "run.sh").read_text()
LAUNCHERS = ("pod", "slurm", "k8s")
# What a document writes for a value of the reader's own, so that a command is not complete as it stands.
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.|…|\[")


def fences(path: Path) -> list[tuple[str, str]]:
    """Returns (language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(path: Path) -> list[str]:
    """Returns every line of a shell block, and every command in running text, continuation lines joined."""
    lines = re.findall(r"(?<!`)`((?:\./run\.sh|python) [^`]+)`", path.read_text())
    for language, text in fences(path):
        if language in ("", "sh", "bash", "shell"):
            lines += [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"(^|[ =])(\./run\.sh|python|vit-scaling)\b", line)]


def docstring_lines(path: Path) -> list[str]:
    """Returns every command that stands on a line of its own in a module's docstring, after a "Word:" or not."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
    return re.findall(r"^\s*(?:\w+: +)?(\./run\.sh .*)$", text, re.MULTILINE)


LINES = [(path.name, line) for path in DOCUMENTS for line in command_lines(path)]
LINES += [
    (path.name, line)
    for folder in ("configs", "vit_scaling")
    for path in sorted((ROOT / folder).glob("*.py"))
    for line in docstring_lines(path)
]
RUNS = sorted({line[line.index("./run.sh") :] for _, line in LINES if "./run.sh" in line})
SNIPPETS = [(path.name, text) for path in DOCUMENTS for language, text in fences(path) if language == "python"]


def test_commands_are_found() -> None:
    assert len(RUNS) >= 80
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("line", RUNS)
def test_a_documented_command_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, configs and overrides are parsed by the command's own parser; launchers show what they would do."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "&" and "$" not in word]
    words = list(itertools.takewhile(lambda word: word not in (";", ">"), words))
    command, arguments = (words or ["smoke"])[0], words[1:]
    assert re.search(rf"^([\w| -]*\b)?{re.escape(command)}\b[\w| -]*\)", RUN_SH, re.MULTILINE), f"no command {command}"
    if command in LAUNCHERS and "..." not in line:
        script = [str(ROOT / "launch" / f"{command}.sh"), *arguments]
        shown = subprocess.run([*script[:1], "--dry-run", *script[1:]], capture_output=True, text=True, cwd=ROOT)
        assert shown.returncode == 0, shown.stderr
    if command not in cli.COMMANDS:
        return
    assert (ROOT / "vit_scaling" / f"{command}.py").exists(), f"{command} is documented and not there"
    monkeypatch.chdir(ROOT)
    configs = [word for word in arguments if word.startswith("--config=")]
    if "--help" in arguments or not arguments or "..." in line or any(PLACEHOLDER.search(word) for word in configs):
        return  # nothing to parse, or a pattern for the reader to fill in
    with contextlib.suppress(MissingFileError):
        parse(command, *arguments)


class MissingFileError(Exception):
    """A command names weights or images of the reader's, which are not here."""


def parse(command: str, *arguments: str) -> None:
    try:
        commands.parse(command, *arguments)
    except UserError as error:
        if not re.search(
            r"there is no file or folder|is neither a file nor a folder|no ViT size is called", str(error)
        ):
            raise
        raise MissingFileError from error


def test_documents_use_one_way_to_give_commands() -> None:
    for name, line in LINES:
        words = shlex.split(line.replace("'", " ").replace('"', " "), comments=True)
        assert "-m vit_scaling" not in line, f"{name}: write ./run.sh COMMAND in place of {line}"
        for before, word in itertools.pairwise(words):
            if before == "python" and word.endswith(".py"):
                assert (ROOT / word).exists(), f"{name} calls {word}"


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SNIPPETS)])
def test_a_documented_snippet_runs(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands. Networks are traced and not computed; weights that are the reader's own are not read."""
    monkeypatch.chdir(ROOT)
    tree = ast.parse(code)
    own_files = [word for word in re.findall(r'"([\w./]+)"', code) if "/" in word or word.endswith(".npz")]
    if any(not os.path.exists(word) and "16" in word for word in own_files if word not in ("S/16", "B/16", "L/16")):
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    program = compile(tree, name, "exec")
    if "models.build" in code:
        jax.eval_shape(lambda: exec(program, {}))
    else:
        exec(program, {})


PUBLIC = {
    "vit_scaling.models": ["build"],
    "vit_scaling.models.vit": ["variant"],
    "vit_scaling.models.swin": ["variant"],
    "vit_scaling.models.attention_cnn": ["convolution_to_attention"],
    "vit_scaling.ops.local": ["local_attention"],
    "vit_scaling.optim.adafactor": ["scale_by_adafactor"],
    "vit_scaling.optim.schedule": ["create"],
    "vit_scaling.flops": ["count"],
    "vit_scaling.laws": ["fit", "fit_joint"],
    "vit_scaling.evaluation.fewshot": ["ridge"],
    "vit_scaling.interop": ["load", "save", "read"],
}


def test_public_names_import_without_starting_a_device() -> None:
    """In a fresh process: no device, no flags, no signal handler, no TensorFlow."""
    code = (
        "import importlib, signal, sys\n"
        f"for module, names in {PUBLIC!r}.items():\n"
        "    for name in names: assert callable(getattr(importlib.import_module(module), name)), (module, name)\n"
        "from jax._src import xla_bridge\n"
        "from absl import flags\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert not any('vit_scaling' in module for module in flags.FLAGS.flags_by_module_dict())\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert not {'tensorflow', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
