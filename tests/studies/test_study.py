"""A scaling study: its plan, its runs (killed, failed, locked, resumed), its table, report and figures."""

import dataclasses
import json
import os
import re
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import fashion_study as fashion_file
from configs import study as study_file
from vit_scaling import config as config_lib
from vit_scaling import flops
from vit_scaling.data.sources import open_source
from vit_scaling.optim.schedule import Duration
from vit_scaling.parallel import mesh
from vit_scaling.studies import findings, report, runner, scaling, summary
from vit_scaling.studies import table as runs
from vit_scaling.studies.scaling import Comparison
from vit_scaling.studies.table import SEED, SWEEP, Run
from vit_scaling.training import loop


@pytest.fixture
def study():
    return study_file.get_config("smoke")


# ---- The plan


def test_the_study_is_large_enough():
    whole = study_file.get_config()
    jobs = scaling.plan(whole, Path("w"))
    assert len({job.size for job in jobs if job.group == SWEEP}) >= 5
    assert len({job.data_images for job in jobs}) >= 2
    per_size = [job for job in jobs if job.group == SWEEP and job.size == 1 and job.data_images == 4000]
    assert len(per_size) >= 3


def test_the_fashion_study_spans_a_factor_of_a_hundred_and_its_rate_is_that_of_mup():
    whole = fashion_file.get_config()
    assert (len(whole.sizes), len(whole.fractions), len(whole.images)) == (6, 4, 4)
    digits = fashion_file.get_config("smoke")
    jobs = scaling.plan(dataclasses.replace(digits, sizes=whole.sizes, dial=whole.dial), Path("w"))
    params = [
        flops.count(job.config.model, image_size=(28, 28), num_classes=10).params for job in jobs if job.group == SWEEP
    ]
    assert max(params) > 100 * min(params)
    assert {(job.config.optim.lr, job.config.model.base_width) for job in jobs} == {(2e-3, 64)}
    compared = [each for each in whole.comparisons if each.name in ("seed1", "seed2")]
    points = {(each.size, each.images) for each in compared}
    assert len(compared) == 2 * len(points) >= 8  # each with two seeds beside the sweep's
    assert all(each.size in whole.sizes and each.images in whole.images for each in whole.comparisons)
    # Half and twice the learning rate, at widths on both sides of the one where it was chosen.
    rates = {each.size: [] for each in whole.comparisons if each.name.startswith("rate")}
    for each in whole.comparisons:
        if each.size in rates and each.name.startswith("rate"):
            rates[each.size].append(dict(each.overrides)["optim.lr"])
    assert rates == {2: [1e-3, 4e-3], 4: [1e-3, 4e-3], 7: [1e-3, 4e-3]}


def test_each_share_of_the_data_is_opened_once(study, monkeypatch):
    opened, real = [], runner.open_source
    monkeypatch.setattr(runner, "open_source", lambda source: opened.append(source.split) or real(source))
    runner._training_set.cache_clear()
    scaling.plan(dataclasses.replace(study, fractions=(0.5, 1.0)), Path("w"))
    assert sorted(opened) == ["train", "train[:50%]"]


def test_runs_that_differ_in_the_seed_alone_are_replicates(study):
    other = (("seed", 1),), (("seed", 1), ("optim.lr", 1e-3))
    study.comparisons = tuple(Comparison(name, 2, 200, overrides) for name, overrides in zip("ab", other, strict=True))
    groups = {job.name: job.group for job in scaling.plan(study, Path("w"))}
    assert (groups["a_d2_i200"], groups["b_d2_i200"]) == (SEED, "b")


def test_one_trunk_serves_every_duration_of_a_size(study):
    study = dataclasses.replace(study, images=(1_000, 2_000, 6_000), fractions=(0.5, 1.0))
    jobs = {job.name: job for job in scaling.plan(study, Path("w"))}
    order = list(jobs)
    for size in study.sizes:
        for percent, data_images in ((50, 2_000), (100, 4_000)):
            trunk = jobs[f"d{size}_p{percent}_trunk"]
            saved = trunk.config.checkpoint.permanent.amount
            for images in study.images:
                branch = jobs[f"d{size}_p{percent}_i{images}"]
                assert branch.needs == trunk.name
                assert order.index(trunk.name) < order.index(branch.name)
                assert branch.steps == images / 20
                assert branch.data_images == data_images == len(open_source(branch.config.data.train))
                start = branch.steps - branch.own_steps
                assert branch.config.schedule.cooldown.amount == branch.own_steps == 0.2 * branch.steps
                assert branch.config.schedule.cooldown_from == f"w/runs/{trunk.name}/checkpoints/{start}"
                assert start % saved == 0 and start <= trunk.steps  # noqa: PT018  the trunk keeps that checkpoint
            assert trunk.config.schedule.cooldown.amount == 0


def test_the_dial_sets_everything(study):
    study.dial = dataclasses.replace(study.dial, width_per_layer=32, head_dim=64, lr_power=-1.0, batch_power=1.0)
    study = dataclasses.replace(study, sizes=(2, 8))
    jobs = {job.size: job.config for job in scaling.plan(study, Path("w")) if job.group == "trunk"}
    model = jobs[8].model
    assert (model.depth, model.width, model.heads, model.mlp) == (8, 256, 4, 1024)
    assert jobs[8].optim.lr == pytest.approx(2e-3 / 2)
    assert jobs[2].optim.lr == pytest.approx(2e-3 * 2)
    assert (jobs[2].data.batch_size, jobs[8].data.batch_size) == (10, 40)


def test_durations_without_a_common_multiple(study):
    jobs = scaling.plan(dataclasses.replace(study, images=(1_000, 1_500, 2_300)), Path("w"))
    for job in (job for job in jobs if job.group == SWEEP):
        assert job.own_steps / job.steps == pytest.approx(0.2, abs=0.02)


def test_comparisons_override_fields(study):
    overrides = (("optim.name", "adam"), ("schedule.kind", "linear"), ("schedule.cooldown", Duration(0)))
    study.comparisons = (Comparison("other", 2, 400, overrides),)
    job = scaling.plan(study, Path("w"))[-1]
    assert (job.config.optim.name, job.config.schedule.kind, job.needs, job.steps) == ("adam", "linear", None, 20)
    assert study.base.optim.name == "adafactor"  # the study itself is left alone


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"sizes": ()}, r"sizes is \(\)"),
        ({"images": (100, 100)}, "images is .* each once"),
        ({"fractions": (0.005, 1.0)}, "fractions has 0.005.*whole number of percent"),
        ({"fractions": (1.5,)}, "fractions has 1.5"),
        ({"cooldown": 1.0}, "cooldown is 1.0"),
        ({"comparisons": (Comparison("x", 2, 100, (("optim.lrr", 1),)),)}, "no field 'optim.lrr'"),
        ({"comparisons": (Comparison("x", 2, 100), Comparison("x", 2, 100))}, "two runs .* called x_d2_i100"),
    ],
)
def test_bad_studies_are_named(study, fields, names):
    with pytest.raises(ValueError, match=names):
        scaling.plan(dataclasses.replace(study, **fields), Path("w"))


def test_schedules_that_need_their_end_have_no_branches(study):
    study.base.schedule.kind = "cosine"
    with pytest.raises(ValueError, match=r"base\.schedule\.kind is 'cosine'"):
        scaling.plan(study, Path("w"))


# ---- Running, with processes that only pretend

PRETEND = """
import json, pathlib, sys
folder, config, mark = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
with mark.open("a") as file: file.write(folder.name + chr(10))
if folder.name in sys.argv[4:]: sys.exit("error: out of luck")
folder.mkdir(parents=True)
(folder / "config.json").write_text(config)
(folder / "result.json").write_text(json.dumps(
    {"metrics": {"test/accuracy": 0.75, "fewshot/10shot": 0.5}, "seconds": {"step": 60.0, "compile": 120.0}}))
"""


def pretend(workdir, *unlucky):
    def command(job):
        stored = json.dumps({"config": config_lib.to_dict(config_lib.resolve(job.config, job.data_images))})
        folder, mark = runner.folder(workdir, job.name), workdir / "started"
        return [sys.executable, "-c", PRETEND, str(folder), stored, str(mark), *unlucky]

    return command


def started(workdir):
    return (workdir / "started").read_text().split()


def test_a_failed_run_does_not_sink_the_rest(study, tmp_path):
    jobs, lines = scaling.plan(study, tmp_path), []
    failed = runner.run_all(jobs, tmp_path, pretend(tmp_path, "d1_p100_trunk"), parallel=2, say=lines.append)
    assert failed == {
        "d1_p100_trunk": "out of luck",
        "d1_p100_i100": "its trunk d1_p100_trunk failed",
        "d1_p100_i200": "its trunk d1_p100_trunk failed",
    }
    assert {run.name for run in scaling.gather(study, jobs, tmp_path)} == {
        "d2_p100_i100",
        "d2_p100_i200",
        "planned_d2_i200",
    }
    assert any("out of luck" in line for line in lines)
    # The next call tries what failed, and only that.
    (tmp_path / "started").unlink()
    assert runner.run_all(jobs, tmp_path, pretend(tmp_path), parallel=1, say=lines.append) == {}
    assert started(tmp_path) == ["d1_p100_trunk", "d1_p100_i100", "d1_p100_i200"]
    table = scaling.gather(study, jobs, tmp_path)
    assert len(table) == 5
    run = table[-1]
    assert (run.error, run.fewshot_error, run.images, run.seconds) == (0.25, 0.5, 200, 180.0)


AFFINITY = """
import os, sys, time
end = time.time() + 30
while len(os.sched_getaffinity(0)) == int(sys.argv[1]) and time.time() < end: time.sleep(0.01)
print(*os.sched_getaffinity(0))
"""


CORES = getattr(os, "sched_getaffinity", lambda process: {0})(0)  # Linux


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_runs_side_by_side_share_no_core(study, tmp_path):
    jobs = [job for job in scaling.plan(study, tmp_path) if job.needs is None][:2]
    command = [sys.executable, "-c", AFFINITY, str(len(CORES))]
    runner.run_all(jobs, tmp_path, lambda job: command, parallel=2, say=lambda line: None)
    first, second = (set(map(int, runner.log_file(tmp_path, job.name).read_text().split())) for job in jobs)
    assert not first & second
    assert len(first) == len(second) == len(CORES) // 2


def test_a_stopped_study_continues(study, tmp_path):
    jobs = scaling.plan(study, tmp_path)

    def stop_after_two(line):
        if line.startswith("[2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_all(jobs, tmp_path, pretend(tmp_path), parallel=1, say=stop_after_two)
    first = started(tmp_path)
    assert len(first) == 2
    lines = []
    runner.run_all(jobs, tmp_path, pretend(tmp_path), parallel=1, say=lines.append)
    assert started(tmp_path) == [job.name for job in jobs]  # each once
    # Two minutes a run beside its steps, as the clocks say of what finished before the stop too.
    minutes = [int(re.search(r"about (\d+) min left", line)[1]) for line in lines[1:]]
    assert all(said >= 2 * left for said, left in zip(minutes, range(len(jobs) - 3, -1, -1), strict=True))
    assert minutes[-1] == 0
    study.base.optim.lr *= 2
    with pytest.raises(ValueError, match=r"belongs to another study: in d1_p100_trunk optim\.lr"):
        runner.run_all(scaling.plan(study, tmp_path), tmp_path, pretend(tmp_path), parallel=1, say=lambda line: None)


def test_a_run_is_never_in_two_hands(tmp_path, capsys):
    held = runner.lock(tmp_path, "a")
    taken = threading.Event()

    def second():
        with runner.lock(tmp_path, "a"):
            taken.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not taken.wait(0.3)
    held.close()
    thread.join(10)
    assert taken.is_set()
    assert "another process runs a" in capsys.readouterr().out


def test_metric_that_runs_do_not_have(study, tmp_path):
    jobs = scaling.plan(study, tmp_path)[-1:]
    runner.run_all(jobs, tmp_path, pretend(tmp_path), parallel=1, say=lambda line: None)
    study.metric = "test/f1"
    with pytest.raises(ValueError, match=r"metric is 'test/f1', but runs measured fewshot/10shot, test/accuracy"):
        scaling.gather(study, jobs, tmp_path)


def test_real_runs_and_a_branch_equals_its_planned_twin(study, tmp_path, monkeypatch):
    create = mesh.create  # one device compiles faster than the tests' eight
    monkeypatch.setattr(mesh, "create", lambda config: create(config, jax.devices()[:1]))
    study = dataclasses.replace(study, sizes=(1,), images=(100,), comparisons=(Comparison("planned", 1, 100),))
    study.base.evaluation.test.split = "test[:20]"
    study.dial.width_per_layer = study.dial.head_dim = 8
    study.base.data.batch_size = 8
    study.base.model.pool, study.base.optim.name = "gap", "sgd"  # these compile faster, too
    jobs = scaling.plan(study, tmp_path)
    for job in jobs:
        loop.train(job.config, runner.folder(tmp_path, job.name))
        assert runner.done(job, tmp_path)
    branch, planned = scaling.gather(study, jobs, tmp_path)
    assert branch.images == planned.images == 96
    assert branch.compute == planned.compute > 0
    losses = []
    for job in jobs[1:]:
        rows = (runner.folder(tmp_path, job.name) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["test/loss"] for row in rows if "test/loss" in row][-1])
    assert losses[0] == losses[1]  # to the last bit


# ---- Table, report, figures


def known_runs(rng=None):
    """Runs of E = 0.02 + 40 N^-0.5 + 150 D^-0.6 at a cost of 20 N D: five sizes, four durations, two data sets."""
    table = []
    for size, params in zip((1, 2, 3, 4, 6), (1e4, 5e4, 15e4, 4e5, 1e6), strict=True):
        for images in (5_000, 15_000, 45_000, 135_000):
            for data in (1_000, 4_000):
                error = 0.02 + 40 * params**-0.5 + 150 * images**-0.6 + (0.03 if data == 1_000 else 0.0)
                error *= 1 if rng is None else 1 + 0.01 * rng.normal()
                name = f"d{size}_p{data}_i{images}"
                table.append(
                    Run(name, SWEEP, size, int(params), data, images, 20 * params * images, error, error / 2, 10.0)
                )
    return table


def test_table_survives_the_file(tmp_path):
    table = [*known_runs(), dataclasses.replace(known_runs()[0], group="gap", fewshot_error=None)]
    runs.write(tmp_path / "runs.csv", table)
    assert runs.read(tmp_path / "runs.csv") == table
    text = (tmp_path / "runs.csv").read_text().replace("1000,5000", "1000,many", 1)
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match=r"runs.csv, line 2: images is 'many'"):
        runs.read(tmp_path / "runs.csv")


@pytest.fixture(scope="module")
def noisy():
    """Returns runs with noise, and what they say."""
    table = known_runs(np.random.default_rng(0))
    return table, findings.find(table)


def test_report_answers_for_a_budget(tmp_path, noisy):
    table = [*noisy[0], dataclasses.replace(noisy[0][-1], name="gap_d6", group="gap", error=0.25)]
    budget = 3e11
    path = report.write(tmp_path, "Digits", table, noisy[1], budgets=[budget], unfinished={"d9_trunk": "out of memory"})
    text = path.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 3.00e+11"))
    params = float(row.split("|")[2].split()[0].replace(",", ""))
    expected = (0.5 * 40 / (0.6 * 150) * (budget / 20) ** 0.6) ** (1 / 1.1)
    assert params == pytest.approx(expected, rel=0.2)
    assert "| d9_trunk | out of memory |" in text
    assert "| gap | 6 | 135,000 | 25.00 |" in text
    for name in ("error_by_compute", "error_by_data", "sample_efficiency", "iso_compute"):
        assert f"figures/{name}.png" in text
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 10_000


def test_the_terminal_shows_exponents_intervals_and_advice(noisy):
    """In 80 columns; the true exponents and irreducible error of `known_runs` lie in the intervals shown."""
    table, found = noisy
    text = summary.text(found, table, [3e11])
    assert max(map(len, text.splitlines())) <= 80
    for line, truth in (("exponent of size   alpha", 0.5), ("exponent of images beta ", 0.6), ("error  e ", 0.02)):
        shown = next(each for each in text.splitlines() if line in each)
        low, high = (float(number) for number in re.search(r"95%: ([\d.]+)%? to ([\d.]+)", shown).groups())
        assert low < truth < high
    best = found.joint.optimum(3e11)
    advice = " ".join(text.partition("what to train:\n")[2].split())
    assert advice.startswith(f"3.00e+11 of compute: {float(f'{best.params:.3g}'):,.0f} parameters on ")
    assert f"error {best.error:.4g} (" in advice
    assert "  delta = 5 is the largest value tried: the error does not fall" in text
    too_few = summary.text(findings.find(table[:2]), table[:2])
    assert "laws that these runs do not determine:\n  No law of compute: " in too_few
    assert summary.text(findings.find([]), []) == "no run of the sweep has finished yet"


def test_law_of_size_and_images_leaves_the_small_data_out():
    found = findings.find(known_runs())
    assert (found.joint.e, found.joint.alpha, found.joint.beta) == pytest.approx((0.02, 0.5, 0.6), rel=1e-2)
    assert found.problems == ()


def test_report_says_what_lies_beyond_the_runs_and_what_is_no_power_law(tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "save", lambda figure, folder, name: None)
    table = known_runs()
    text = report.write(tmp_path, "Digits", table, findings.find(table), budgets=[1e11, 1e15]).read_text()
    inside, beyond = (line for line in text.splitlines() if line.startswith(("| 1.00e+11", "| 1.00e+15")))
    assert "beyond" not in inside
    assert "beyond the sizes run" in beyond
    assert "(beyond the lengths run)" in beyond
    assert "steepest" not in text
    # All sizes but the smallest are alike.
    step = [dataclasses.replace(run, error=150 * run.images**-0.6 + 0.5 * (run.size == 1)) for run in table]
    assert "alpha = 5 is the largest value tried" in " ".join(findings.find(step).joint.warnings)


def test_report_of_too_little_says_so(tmp_path):
    text = report.write(tmp_path, "Digits", known_runs()[:2], findings.find(known_runs()[:2])).read_text()
    assert "not determined" in text
    assert "four coefficients need at least 5" in text
    assert "No run of the sweep" in report.write(tmp_path, "Digits", [], findings.find([])).read_text()
