"""Run a scaling study or a sweep over fields of a config, fit its laws and draw its figures.

    ./run.sh study --config=configs/study.py --workdir=studies/digits
    ./run.sh study --config=configs/study.py --workdir=/shared/study \\
        --print=slurm > study.sh

The study runs on this machine, one process for each run, --parallel at a time (with more than one, process i sees GPU
i). The same command, given again, continues a study that was killed and tries failed runs again. Results so far are in
<workdir>/runs.csv, <workdir>/report.md and <workdir>/figures/. The exit code is 1 if any run failed.
"""

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_scaling import UserError, cli

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study.", required=True)
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time on this machine.", lower_bound=1)
_PRINT = flags.DEFINE_enum(
    "print", None, ["commands", "slurm"], "Print the runs' commands for a cluster instead of running them."
)
_ONLY = flags.DEFINE_string("only", None, "Run this one run of the study, here.")
_REPORT = flags.DEFINE_bool("report", False, "Run nothing; gather what has finished and report.")
_OWN_FLAGS = ("parallel", "print", "only", "report")


def main(argv: Sequence[str]) -> None:
    del argv
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling.pages import study as study_page
    from vit_scaling.studies import grid, report, runner, scaling
    from vit_scaling.studies import table as runs

    workdir, study = Path(_WORKDIR.value), _CONFIG.value
    if not isinstance(study, scaling.StudyConfig | grid.GridConfig):
        raise UserError("--config is a single run and not a study; run it with the command train")
    jobs = grid.plan(study) if isinstance(study, grid.GridConfig) else scaling.plan(study, workdir)
    if _ONLY.value:
        _run_one(jobs, workdir, _ONLY.value)
        return
    if _PRINT.value:
        print(_slurm(jobs) if _PRINT.value == "slurm" else _commands(jobs))
        return

    failed: dict[str, str] = {}
    if not _REPORT.value:
        work = sum(runner.work(job) for job in jobs)
        print(f"{len(jobs)} runs of {work:.1e} training FLOPs in all; logs are in {workdir / 'logs'}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ask for an orderly stop
        try:
            failed = runner.run_all(
                jobs, workdir, _command, parallel=_PARALLEL.value, say=lambda line: print(line, flush=True)
            )
        except KeyboardInterrupt:
            print("stopped; the same command continues from there", file=sys.stderr)
            sys.exit(130)
    workdir.mkdir(parents=True, exist_ok=True)
    if isinstance(study, grid.GridConfig):
        text = grid.table(study, jobs, workdir)
        (workdir / "table.md").write_text(text)
        print(f"{text}table: {workdir / 'table.md'}")
        _leave_if(failed, len(jobs))
        return
    table = scaling.gather(study, jobs, workdir)
    runs.write(workdir / "runs.csv", table)
    unfinished = {job.name: failed.get(job.name, "has not run yet") for job in jobs if not runner.done(job, workdir)}
    path = report.write(workdir, f"Scaling study {workdir.name}", table, study.budgets, unfinished)
    shown = study_page.write(workdir, f"Scaling study {workdir.name}", table, unfinished)
    print(path.read_text().split("\n## ")[1])
    print(f"report:  {path} and {shown}\ntable:   {workdir / 'runs.csv'}\nfigures: {workdir / 'figures'}")
    _leave_if(failed, len(jobs))


def _leave_if(failed: dict[str, str], total: int) -> None:
    if failed:
        print(f"{len(failed)} of {total} runs failed; the logs say why, and the same command tries them again")
        sys.exit(1)


def _run_one(jobs: Sequence, workdir: Path, name: str) -> None:
    from vit_scaling.studies import runner
    from vit_scaling.training import loop

    job = next((job for job in jobs if job.name == name), None)
    if job is None:
        raise UserError(f"--only={name} is not a run of the study; the first is {jobs[0].name}")
    with runner.lock(workdir, name):
        result = loop.train(job.config, runner.folder(workdir, name))
    if "interrupted" in result:
        sys.exit(1)


def _command(job) -> list[str]:
    """Returns the command of one run: this process's own, with --only."""
    own = [argument for argument in sys.argv[1:] if argument.lstrip("-").partition("=")[0] not in _OWN_FLAGS]
    return [sys.executable, "-m", "vit_scaling.study", *own, f"--only={job.name}"]


def _commands(jobs: Sequence) -> str:
    """Returns one command a line; those after the second comment need the ones before it."""
    first = [shlex.join(_command(job)) for job in jobs if job.needs is None]
    second = [shlex.join(_command(job)) for job in jobs if job.needs is not None]
    report = shlex.join([*_command(jobs[0])[:-1], "--report"])
    return "\n".join(
        ["# These in any order:", *first, "# Then these in any order:", *second, "# Then, anywhere:", report]
    )


def _slurm(jobs: Sequence) -> str:
    """Returns a script that submits two job arrays and the report, each after the one before it."""
    stages = [[job for job in jobs if job.needs is None], [job for job in jobs if job.needs is not None]]
    lines = [
        "#!/bin/sh",
        "# Submits a scaling study; add partition, GPUs and time to SBATCH as the cluster asks.",
        "set -e",
    ]
    after = ""
    for index, stage in enumerate(stages):
        names = " ".join(job.name for job in stage)
        command = shlex.join(_command(stage[0])[:-1])
        body = f"set -- {names}; shift $SLURM_ARRAY_TASK_ID; {command} --only=$1"
        lines.append(
            f"STAGE{index}=$(sbatch --parsable $SBATCH{after} --array=0-{len(stage) - 1} --wrap={shlex.quote(body)})"
        )
        after = f" --dependency=afterany:$STAGE{index}"
    report = shlex.quote(shlex.join([*_command(jobs[0])[:-1], "--report"]))
    lines.append(f"sbatch $SBATCH{after} --wrap={report}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, __doc__)
