"""Tables of runs: columns, units, groups, what is left out, the report, and every bad table."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import commands
from tests.studies.test_study import known_runs
from vit_scaling import UserError, cli, laws
from vit_scaling.studies import findings, points, report
from vit_scaling.studies.table import SEED

CHINCHILLA = Path(__file__).parents[1] / "files" / "chinchilla_points.csv"
JFT = Path(__file__).parents[1] / "files" / "jft_scaling_runs.csv"


def table(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def runs(tmp_path):
    """E = 0.02 + 40 N^-0.5 + 150 T^-0.6 for 4 sizes in millions and 4 lengths in thousands of images; percent."""
    lines = ["name, size,seen,cost,wrong,task"]
    for size in (0.01, 0.05, 0.2, 1.0):
        for seen in (10, 30, 90, 270):
            error = 0.02 + 40 * (size * 1e6) ** -0.5 + 150 * (seen * 1e3) ** -0.6
            lines.append(
                f"a, {size},{seen},{20 * size * seen:.6g},{100 * error:.10g},{'odd' if seen == 30 else 'even'}"
            )
    return table(tmp_path / "runs.csv", lines)


def command(*arguments):
    """Runs the command study in this process."""
    with commands.loaded("study", *arguments) as module:
        cli.parse(sys.argv)
        module.main(sys.argv[:1])


COLUMNS = {"compute": "cost*1e9", "error": "wrong/100", "params": "size*1e6", "images": "seen*1e3"}


def test_units_and_columns(runs):
    read = points.read(runs, COLUMNS)
    (own,) = read.groups.values()
    assert len(own) == 16
    first = own[0]
    assert (first.params, first.images, first.compute) == (pytest.approx(1e4), pytest.approx(1e4), pytest.approx(2e9))
    assert first.error == pytest.approx(0.02 + 0.4 + 150 * 1e4**-0.6)
    found = findings.find(own)
    assert (found.joint.e, found.joint.alpha, found.joint.beta) == pytest.approx((0.02, 0.5, 0.6), rel=1e-3)
    assert (found.joint.kappa, found.joint.gamma) == (pytest.approx(20), pytest.approx(1))
    assert dict(read.origin)["columns"].startswith("compute: cost times 1e+09; error: wrong times 0.01")
    assert dict(read.origin)["not in the table"] == "unique, deviation"


def test_groups_are_fitted_apart_and_without_compute_runs_cost_6nt(runs):
    read = points.read(runs, {**COLUMNS, "compute": None}, "task")
    assert {name: len(own) for name, own in read.groups.items()} == {"even": 12, "odd": 4}
    assert read.groups["odd"][0].compute == pytest.approx(6 * 1e4 * 3e4)
    assert dict(read.origin)["groups"] == "one table for each value of task"
    assert points.folder("MiX/B 16") == "MiX_B_16"


def test_lines_without_a_number_are_left_out_and_named():
    read = points.read(JFT, {"compute": "tpuv3_core_days", "error": "inet10_err/100"})
    assert dict(read.origin)["runs left out"] == "3 without inet10_err (lines 62, 151, 168)"
    assert len(read.groups[""]) == 262


@pytest.mark.parametrize(
    ("lines", "columns", "sentence"),
    [
        (["compute,error", "1,0.5", "2,x"], {}, "line 3: error is 'x', which is no number"),
        (["compute,error", "1,0.5", "0,0.4"], {}, "line 3: compute is 0; it must be positive"),
        (["compute,error", "1,0.5", "2,inf"], {}, "line 3: error is inf; it must be positive and finite"),
        (["compute,error", "1,0.5,3"], {}, "line 2: 3 cells under 2 columns"),
        (["compute,compute", "1,0.5"], {}, "line 1: two columns are called 'compute'"),
        (["compute,err", "1,0.5"], {}, "no column error; name it with --error=COLUMN: the columns are compute, err"),
        (["flops,error", "1,0.5"], {}, "no column compute; name it with --compute=COLUMN, or --params and --images"),
        (["compute,error", "1,0.5"], {"error": "err"}, "--error=err: .* has no such column; the columns are compute"),
        (["compute,error", "1,0.5"], {"error": "error/0.0.1"}, "'0.0.1' is no number"),
        (["compute,error", "1,0.5"], {"error": "error*-1"}, "the factor is -1; it is positive"),
        (["compute,error"], {}, "has 1 lines"),
        (["compute,error", "1,", "2,"], {}, "every line has an empty cell in error"),
    ],
)  # fmt: skip
def test_bad_tables_are_named(tmp_path, lines, columns, sentence):
    with pytest.raises(UserError, match=sentence):
        points.read(table(tmp_path / "t.csv", lines), columns)


def test_missing_files_and_groups_are_named(runs):
    with pytest.raises(UserError, match=r"there is no file none\.csv"):
        points.read(Path("none.csv"), {})
    with pytest.raises(UserError, match="has no column 'model' to group by; the columns are name, size"):
        points.read(runs, COLUMNS, "model")


def test_the_command_reports_and_its_laws_load_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(f"--points={CHINCHILLA}", "--compute=training_flops", "--budgets=1e22,1e23")
    text = Path("studies/chinchilla_points/report.md").read_text()
    law = laws.load("studies/chinchilla_points/laws/compute.json")
    assert f"| 1.00e+23 | not determined | not determined | not determined | {law.predict(1e23):.4g}" in text
    assert "| columns | compute: training_flops; error: loss; params: params |" in text
    assert "| law of compute | c + a (C + d)^-b, 4 coefficients," in text
    assert "No law of size and images: the table has no parameters or no images seen." in text
    assert "1.00e+23" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--points=none.csv",), "there is no file none.csv"),
        (("--points=none.csv", "--config=study:smoke"), "give one of them"),
        (("--points=none.csv", "--budgets=1e9,x"), "--budgets=1e9,x: give numbers"),
        (("--points=none.csv", "--budgets=-1"), "--budgets has -1"),
        ((f"--points={CHINCHILLA}", "--compute=training_flops", "--held_out=1.5"), "held_out is 1.5"),
        (("--workdir=x",), "--config is missing"),
        (("--config=study:smoke",), "--workdir is missing"),
        (("--config=study:smoke", "--workdir=x", "--group=a"), "--group names a column of a table; give --points"),
    ],
)
def test_bad_flags_are_named(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        command(*arguments)


def test_a_table_of_no_law_is_an_error(tmp_path):
    path = table(tmp_path / "t.csv", ["compute,error", "1,0.5", "2,0.4"])
    with pytest.raises(UserError, match=r"supports no law: No law of compute: 2 of the 2 runs lie on the frontier"):
        command(f"--points={path}", f"--workdir={tmp_path / 'out'}")


# ---- What the findings say beside the laws


def test_replicates_give_the_noise_between_seeds():
    rng = np.random.default_rng(0)
    seeds = [
        dataclasses.replace(run, name=f"{run.name}_{seed}", error=run.error * (1 + 0.02 * rng.normal()))
        for run in known_runs()
        for seed in range(3)
    ]
    assert findings.of_replicates(seeds) == pytest.approx(0.02, rel=0.15)
    assert findings.of_replicates(known_runs()) is None
    other = [dataclasses.replace(run, group=SEED, error=1.02 * run.error) for run in known_runs()]
    other += [dataclasses.replace(run, group="adam", error=2 * run.error) for run in known_runs()]
    assert findings.find([*known_runs(), *other]).deviation == pytest.approx(0.02 / 2**0.5, rel=0.02)
    own = [dataclasses.replace(run, deviation=0.01) for run in known_runs()]
    assert findings.noises(own, 0.5).tolist() == [0.01] * len(own)


@pytest.fixture(scope="module")
def found():
    return findings.find(known_runs(np.random.default_rng(0)))


def test_the_largest_runs_are_predicted_by_the_others(found):
    tests = {each.law: each for each in found.held_out}
    assert set(tests) == {"compute", "size and images", "repeated data"}
    two = tests["size and images"]
    assert (two.fitted + two.judged, two.judged) == (20, 4)
    assert two.miss < 0.05


def test_a_break_is_used_only_where_it_predicts_better():
    x = np.geomspace(1e6, 1e9, 40)
    run = known_runs()[0]
    bent = 0.05 + 0.6 * (x / 1e7) ** -0.05 * (1 + (x / 1e7) ** (1 / 0.3)) ** (-0.5 * 0.3)
    straight = 0.1 + 0.4 * (x / 1e8) ** -0.4
    options = findings.Options(frontier="all")
    for errors, names in ((bent, ["compute", "compute, with a break"]), (straight, ["compute"])):
        table = [dataclasses.replace(run, compute=c, error=e) for c, e in zip(x, errors, strict=True)]
        found = findings.find(table, options)
        assert [each.law for each in found.held_out] == names
        assert (found.broken is not None) is (len(names) == 2)


def test_a_break_that_predicts_worse_is_not_used(monkeypatch):
    x = np.geomspace(1e6, 1e9, 30)
    table = [dataclasses.replace(known_runs()[0], compute=c, error=0.1 + 0.4 * (c / 1e8) ** -0.4) for c in x]
    wrong = findings.CurveLaw(0.9, 0.1, 0.2, 1e8, 1.0, np.ones((1, 5)), 0.95)
    monkeypatch.setattr(findings.curve, "fit", lambda *columns, **options: wrong)
    found = findings.find(table, findings.Options(frontier="all"))
    assert found.broken is None
    assert [each.law for each in found.held_out] == ["compute", "compute, with a break"]


def test_residuals_are_those_of_every_law(found):
    table = known_runs(np.random.default_rng(0))
    rows = findings.residuals(found, table)
    assert {row.law for row in rows} == {"compute", "size and images", "repeated data"}
    for row in rows:
        assert row.relative == pytest.approx(row.run.error / row.fitted - 1)
    two = [row for row in rows if row.law == "size and images"]
    assert len(two) == 20
    assert two[3].fitted == pytest.approx(float(found.joint.predict(two[3].run.params, two[3].run.images)))
    assert max(abs(row.relative) for row in two) < 0.05


def test_each_size_is_left_out_once(found):
    assert [size for size, *_ in found.rainbow] == [1e4, 5e4, 15e4, 4e5, 1e6]
    for size, law, two in found.rainbow:
        assert law is not None
        assert two.size_range == (1e4 if size != 1e4 else 5e4, 1e6 if size != 1e6 else 4e5)


def test_the_report_shows_more_data_residuals_and_the_checklist(found, tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "save", lambda figure, folder, name: None)
    text = report.write(tmp_path, "Runs", known_runs(np.random.default_rng(0)), found).read_text()
    for title in ("## What more different images would give", "## How far to trust it", "## How this was fitted"):
        assert title in text
    for name in ("residuals", "rainbow", "iso_compute"):
        assert f"(figures/{name}.png)" in text
    assert "| runs | 40: 5 sizes, 4 lengths, 2 numbers of different images |" in text
    assert {path.stem for path in (tmp_path / "laws").iterdir()} == {"compute", "joint", "repeated"}
