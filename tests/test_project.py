"""run.sh, the requirements, and the links of the documents."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vit_scaling import cli

ROOT = Path(__file__).parent.parent


def shell(*command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)


def tools(folder: Path) -> str:
    """A PATH with what run.sh itself needs, and no Python."""
    folder.mkdir()
    for name in ("bash", "dirname", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def fake(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def test_run_sh_passes_over_pythons_that_do_not_run(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin")
    fake(tmp_path / "bin" / "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    fake(tmp_path / "bin" / "python3.12", f'exec {sys.executable} "$@"')
    found = shell("./run.sh", "python", path=path)
    assert (found.returncode, found.stdout.strip()) == (0, f"{path}/python3.12")


def test_run_sh_says_when_there_is_no_python(tmp_path: Path) -> None:
    path = tools(tmp_path / "bin")
    fake(tmp_path / "bin" / "python3", "exit 1")
    found = shell("./run.sh", "python", path=path)
    assert found.returncode == 2
    assert "error: no Python from 3.11 to 3.14 that runs" in found.stderr


def test_run_sh_explains_itself() -> None:
    for word in ("help", "--help", "-h"):
        helped = shell("./run.sh", word)
        assert helped.returncode == 0
        for command in (*cli.COMMANDS, "pod", "slurm", "k8s", "install", "test", "lint", "mutants", "faults"):
            assert f"./run.sh {command} " in helped.stdout
    unknown = shell("./run.sh", "tset")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: there is no command 'tset'; ./run.sh help lists them\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """run.sh in a folder of its own, with a Python that only notes what it is asked."""
    for name in ("run.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    notes = """
        case "$*" in
        -c*) exit 0 ;;
        --version) echo Python 3.11; exit 0 ;;
        "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
        "-m pip "*) [ ! -e pip_fails ] || exit 7 ;;
        esac
        echo "$*" >>calls
        [ ! -e code ] || exit "$(cat code)"
    """
    (tmp_path / "bin").mkdir()
    fake(tmp_path / "bin" / "python3.14", notes)
    return tmp_path


def start(copy: Path, *arguments: str) -> tuple[int, list[str]]:
    """Runs run.sh and returns its exit code and what Python was asked to do."""
    (copy / "calls").write_text("")
    environment = os.environ | {"PATH": f"{copy / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["./run.sh", *arguments], cwd=copy, capture_output=True, text=True, timeout=60, env=environment
    )
    return done.returncode, (copy / "calls").read_text().splitlines()


VENV = "-m venv .venv"
PIP = "-m pip install --quiet --disable-pip-version-check --editable ."


def test_run_sh_installs_once_and_again_when_the_requirements_change(copy: Path) -> None:
    costs = "-m vit_scaling.costs --config=a b"
    assert start(copy, "costs", "--config=a b") == (0, [VENV, PIP, costs])
    assert start(copy, "costs", "--config=a b") == (0, [costs])
    for name in ("requirements.txt", "pyproject.toml"):
        (copy / name).write_text((copy / name).read_text() + "\n# changed\n")
        assert start(copy, "costs", "--config=a b") == (0, [PIP, costs]), name
        assert start(copy, "costs", "--config=a b") == (0, [costs])
    assert start(copy, "install", "tpu") == (0, [PIP + "[tpu]"])
    assert start(copy, "install", "tpu") == (0, [])
    (copy / "pip_fails").touch()
    assert start(copy, "install", "cuda") == (7, [])
    (copy / "pip_fails").unlink()
    assert start(copy, "install", "cuda") == (0, [PIP + "[cuda]"])  # what failed is not taken for done


def test_run_sh_makes_an_environment_again_whose_python_does_not_run(copy: Path) -> None:
    assert start(copy, "install") == (0, [VENV, PIP])
    fake(copy / ".venv" / "bin" / "python", "exit 127")
    assert start(copy, "install") == (0, [VENV, PIP])


def test_run_sh_passes_every_command_on_with_its_exit_code(copy: Path) -> None:
    start(copy, "install")
    for command in cli.COMMANDS:
        assert start(copy, command, "--a=1", "b c") == (0, [f"-m vit_scaling.{command} --a=1 b c"])
    smoke = "-m vit_scaling.train --config=configs/smoke.py --workdir=runs/smoke"
    assert start(copy) == (0, [smoke])
    (copy / "code").write_text("2")
    assert start(copy, "train") == (2, ["-m vit_scaling.train"])
    assert start(copy) == (2, [smoke])


def test_run_sh_runs_the_checks(copy: Path) -> None:
    (copy / "launch").mkdir()
    for name in ("pod", "slurm", "k8s"):
        fake(copy / "launch" / f"{name}.sh", f'echo "{name} $*" >>calls; exit 3')
        assert start(copy, name, "--dry-run") == (3, [f"{name} --dry-run"])
    start(copy, "install", "test")
    for name in ("ruff", "mypy"):
        fake(copy / ".venv" / "bin" / name, f'echo "{name} $*" >>calls; [ "$1" != "$(cat bad)" ]')
    (copy / "bad").write_text("nothing")
    assert start(copy, "test", "-k", "x") == (0, ["-m pytest --numprocesses=2 --dist=loadfile -k x"])
    assert start(copy, "mutants", "a") == (0, ["-m tests.mutants a"])
    assert start(copy, "faults", "--seed=1") == (0, ["-m tests.faults --seed=1"])
    start(copy, "install", "docs")
    assert start(copy, "docs") == (0, ["-m mkdocs build --strict"])
    assert start(copy, "lint") == (0, ["ruff format --check .", "ruff check .", "mypy "])
    for bad, said in (("format", 1), ("check", 2), ("", 3)):
        (copy / "bad").write_text(bad)
        code, calls = start(copy, "lint")
        assert (code, len(calls)) == (1, said), bad


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_scripts_pass_shellcheck(script: str) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    found = shell(str(checker) if checker.exists() else "shellcheck", script)
    assert found.returncode == 0, found.stdout


def test_requirements_are_ranges_from_the_index() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+>=[0-9.]+(,<[0-9.]+)?(; (sys_platform|platform_machine) .+)?", line), line
    names = {re.split(r"[>=<]", line)[0].lower() for line in lines}
    assert not names & {"tensorflow", "torch", "transformers", "timm"}


def test_versions_agree() -> None:
    import vit_scaling

    assert f"version: {vit_scaling.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
