"""Puts each mistake into a copy of the tree and runs its tests: `python -m tests.mutants [NAME ...]`.

Exit code 1 if a mistake survives, or if its patch no longer applies; 2 if there is no such mistake.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import PATCHES, TABLE

ROOT = Path(__file__).parents[2]


def copy_tree(target: Path) -> None:
    """Copies the project without what .gitignore names."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", *ignored), dirs_exist_ok=True)


def apply(tree: Path, name: str, *options: str) -> bool:
    """Applies a patch, with one line of context, and returns whether it fits."""
    command = ["git", "apply", "-C1", *options, str(PATCHES / f"{name}.patch")]
    return subprocess.run(command, cwd=tree, capture_output=True).returncode == 0


def verdict(tree: Path, name: str) -> str:
    """Returns "caught", "survived" or "patch no longer applies" for one mistake, and leaves the tree as it was."""
    if not apply(tree, name):
        return "patch no longer applies"
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TABLE[name].split()]
        code = subprocess.run(command, cwd=tree, capture_output=True).returncode
    finally:
        assert apply(tree, name, "--reverse")
    return {0: "survived", 1: "caught"}.get(code, f"pytest exited with {code}")


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in TABLE]:
        print(f"error: there is no mistake {unknown[0]!r}; there are {', '.join(TABLE)}", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)  # so that `git apply` looks at this tree alone
        for name in names or TABLE:
            started = time.monotonic()
            answer = verdict(tree, name)
            print(f"{answer:24s} {name:44s} {time.monotonic() - started:5.0f} s", flush=True)
            failed += [name] if answer != "caught" else []
    print(f"{len(names or TABLE) - len(failed)} caught, {len(failed)} not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
