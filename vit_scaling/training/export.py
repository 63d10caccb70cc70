"""Exports of a run at its end: `weights export` in a process of its own, so that its failures cannot end the run."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from vit_scaling import UserError, paths
from vit_scaling.config import Config
from vit_scaling.interop import serving, writing
from vit_scaling.parallel import processes

FOLDER = "export"


def check(config: Config) -> None:
    """Raises UserError where `config.export` names a layout that does not exist or whose packages are missing."""
    for layout in config.export:
        if layout not in (*writing.LAYOUTS, *serving.LAYOUTS):
            choices = ", ".join((*writing.LAYOUTS, *serving.LAYOUTS))
            raise UserError(f"export has {layout!r}; choose of {choices}")
        serving.require(layout)


def write_all(config: Config, workdir: Path, checkpoint: Path) -> None:
    """Writes workdir/export/LAYOUT for each layout of `config.export`, and LAYOUT_ema where the run has an average.

    A local folder is written whole or not at all, and one that exists is left as it is; in a bucket it is written
    again. A layout that fails is one line on the terminal. Every process of the run calls this; process 0 writes.
    """
    for layout in config.export:
        for flags in ([], ["--ema"])[: 1 if config.optim.ema is None else 2]:
            name = f"{layout}_ema" if flags else layout
            processes.first(lambda: _write(layout, flags, checkpoint, workdir / FOLDER / name))  # noqa: B023


def _write(layout: str, flags: list[str], checkpoint: Path, target: Path) -> None:
    try:
        if paths.in_bucket(target):
            paths.remove_folder(target)  # it may be half of an upload
        elif target.exists():
            return
        _run(layout, flags, checkpoint, target)
    except Exception as error:  # an export is never worth a run, and can be written later
        again = f"weights export --input={checkpoint} --layout={layout} {' '.join([*flags, '--output=DIR'])}"
        print(f"the export {target.name} failed ({error}); {again} writes it", file=sys.stderr, flush=True)


def _run(layout: str, flags: list[str], checkpoint: Path, output: Path) -> None:
    """Runs the command on the CPU, whose memory and whose device no step uses any more.

    Raises:
        RuntimeError: the command failed; with its last line.
    """
    words = ["export", f"--input={checkpoint}", f"--output={output}", f"--layout={layout}", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "vit_scaling.weights", *words],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        # The other processes wait no longer than this for process 0.
        timeout=None if jax.process_count() == 1 else 0.8 * processes.WAIT_SECONDS,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    print(f"exported {output}", flush=True)
