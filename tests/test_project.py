"""run.sh and the words of the house."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    assert found.returncode == 1
    assert "error: no Python from 3.11 to 3.14 that runs" in found.stderr


def test_run_sh_explains_itself() -> None:
    helped = shell("./run.sh", "help")
    assert helped.returncode == 0
    assert "./run.sh test" in helped.stdout
    unknown = shell("./run.sh", "tset")
    assert unknown.returncode == 1
    assert "there is no command 'tset'" in unknown.stderr


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
