"""Run a scaling study, a sweep over fields of a config, or claims of papers in miniature, and report what came out.

    ./run.sh study --config=configs/study.py --workdir=studies/digits
    ./run.sh study --config=configs/claims.py:pool --workdir=studies/claims
    ./run.sh study --config=configs/study.py --workdir=/shared/study \\
        --print=slurm > study.sh
    ./run.sh study --points=runs.csv --compute=core_days --error=top1/100

The study runs on this machine, one process for each run, --parallel at a time (with more than one, process i sees GPU
i and has its share of the cores). The same command, given again, continues a study that was killed and tries failed
runs again. Results so far are in <workdir>/runs.csv, <workdir>/report.md, <workdir>/report.html and
<workdir>/figures/. The exit code is 1 if any run failed.

With --points nothing runs: the laws are fitted to a table of runs, with a column for each quantity. A column may be
given with a factor, COLUMN*NUMBER or COLUMN/NUMBER. The report is written to --workdir, by default FILE's name in
studies/.
"""

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_scaling import UserError, cli

_CONFIG = cli.define_config(required=False)
_WORKDIR = flags.DEFINE(cli.PathParser(), "workdir", None, "Folder of the study.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time on this machine.", lower_bound=1)
_PRINT = flags.DEFINE_enum(
    "print", None, ["commands", "slurm"], "Print the runs' commands for a cluster instead of running them."
)
_ONLY = flags.DEFINE_string("only", None, "Run this one run of the study, here.")
_REPORT = flags.DEFINE_bool("report", False, "Run nothing; gather what has finished and report.")
_POINTS = flags.DEFINE(cli.PathParser(), "points", None, "Fit the runs in this CSV file instead of running a study.")
_COLUMNS = {
    name: flags.DEFINE_string(name, None, f"Column of the table: {meaning}.")
    for name, meaning in {
        "compute": "what a run cost, in any unit; without it 6 times parameters times images",
        "error": "error or loss",
        "params": "parameters of the model",
        "images": "images seen",
        "unique": "different images in the training set",
        "deviation": "standard deviation of the error between seeds",
    }.items()
}
_GROUP = flags.DEFINE_string("group", None, "Column of the table: fit laws to the runs of each of its values.")
_CHANCE = flags.DEFINE_float("chance", None, "Error of guessing, for the law of repeated data; fitted if not given.")
_HELD_OUT = flags.DEFINE_float("held_out", 0.2, "Share of the table's runs that the laws predict for a test.")
_FRONTIER = flags.DEFINE_enum(
    "frontier", "minimum", ["minimum", "hull", "all"], "Runs of the table that the law of compute is fitted to."
)
_BUDGETS = flags.DEFINE_list("budgets", [], "Compute to answer for; by default 1, 3 and 10 times the largest.")
_OWN_FLAGS = ("parallel", "print", "only", "report")


def main(argv: Sequence[str]) -> None:
    del argv
    if _POINTS.value is not None:
        if _CONFIG.value is not None:
            raise UserError("--points fits a table and --config runs a study; give one of them")
        _fit_points(Path(_POINTS.value))
        return
    if _CONFIG.value is None or _WORKDIR.value is None:
        missing = "config" if _CONFIG.value is None else "workdir"
        raise UserError(f"--{missing} is missing; give --config and --workdir to run a study, or --points=FILE.csv")
    if given := [f"--{name}" for name, flag in (*_COLUMNS.items(), ("group", _GROUP)) if flag.value is not None]:
        raise UserError(f"{given[0]} names a column of a table; give --points=FILE.csv with it")
    _run_study(Path(_WORKDIR.value), _CONFIG.value)


def _fit_points(path: Path) -> None:
    """Fits and reports a table of runs; a table that supports no law at all is an error."""
    from vit_scaling.pages import study as study_page
    from vit_scaling.studies import findings, points, report, summary

    try:
        budgets = [float(budget) for budget in _BUDGETS.value]
    except ValueError:
        raise UserError(f"--budgets={','.join(_BUDGETS.value)}: give numbers, separated by commas") from None
    if bad := [budget for budget in budgets if not 0 < budget < float("inf")]:
        raise UserError(f"--budgets has {bad[0]:g}; a budget is positive and finite")
    table = points.read(path, {name: flag.value for name, flag in _COLUMNS.items()}, _GROUP.value)
    options = findings.Options(_CHANCE.value, _HELD_OUT.value, _FRONTIER.value)
    workdir = Path(_WORKDIR.value or Path("studies") / path.stem)
    problems: list[str] = []
    some = False
    for group, own in sorted(table.groups.items()):
        folder = workdir / points.folder(group) if group else workdir
        found = findings.find(own, options)
        title = f"Laws of {path.name}" + (f", {_GROUP.value} = {group}" if group else "")
        written = report.write(folder, title, own, found, budgets=budgets, origin=table.origin)
        shown = study_page.write(folder, title, own, {}, found, table.origin)
        some |= any(law is not None for law in (found.law, found.joint, found.repeated))
        problems += found.problems
        if group:
            print(f"{group}: {len(own)} runs", flush=True)
        print(summary.text(found, own, budgets))
        print(f"report: {written} and {shown}\nlaws:   {written.parent / 'laws'}")
    if not some:
        raise UserError(f"{path} supports no law: {' '.join(problems[:3])}")


def _run_study(workdir: Path, study: Any) -> None:
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling.pages import study as study_page
    from vit_scaling.studies import claims, findings, grid, report, runner, scaling, summary
    from vit_scaling.studies import table as runs

    if isinstance(study, grid.GridConfig):
        jobs = grid.plan(study)
    elif isinstance(study, claims.ClaimsConfig):
        jobs = claims.plan(study)
    elif isinstance(study, scaling.StudyConfig):
        jobs = scaling.plan(study, workdir)
    else:
        raise UserError("--config is a single run and not a study; run it with the command train")
    if _ONLY.value:
        _run_one(jobs, workdir, _ONLY.value)
        return
    if _PRINT.value:
        print(_slurm(jobs) if _PRINT.value == "slurm" else _commands(jobs))
        return

    failed: dict[str, str] = {}
    if not _REPORT.value:
        if isinstance(study, claims.ClaimsConfig):
            print(claims.describe(study, jobs), flush=True)
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
        print(f"{grid.summary(study, jobs, workdir)}\ntable: {workdir / 'table.md'}")
        _leave_if(failed, len(jobs))
        return
    if isinstance(study, claims.ClaimsConfig):
        path = claims.write(claims.gather(study, jobs, workdir), len(study.seeds), workdir)
        print(f"{path.read_text()}report: {path}, figures: {workdir / 'figures'}")
        _leave_if(failed, len(jobs))
        return
    table = scaling.gather(study, jobs, workdir)
    runs.write(workdir / "runs.csv", table)
    unfinished = {job.name: failed.get(job.name, "has not run yet") for job in jobs if not runner.done(job, workdir)}
    found = findings.find(table, findings.Options(study.chance))
    title = f"Scaling study {workdir.name}"
    path = report.write(workdir, title, table, found, budgets=study.budgets, unfinished=unfinished)
    shown = study_page.write(workdir, title, table, unfinished, found)
    print(summary.text(found, table, study.budgets))
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
