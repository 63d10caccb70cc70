"""A whole run: it resumes as if it had never stopped, whatever stopped it."""

import dataclasses
import errno
import faulthandler
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import test_extras, tiny
from vit_scaling import TransientError, UserError, interop
from vit_scaling import config as c
from vit_scaling.data import order
from vit_scaling.data.images.codec import CorruptImageError
from vit_scaling.data.sources import open_source
from vit_scaling.data.sources.arrays import BuiltinSource
from vit_scaling.evaluation.suite import Suite
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import checkpoint, export, figure, initial, loop, step_log, telemetry
from vit_scaling.training import workdir as workdirs
from vit_scaling.training.step import build

ROOT = Path(__file__).parents[2]
# What a run measures of its own speed; all else must be equal.
SPEED = {
    "step_seconds",
    "images_per_second_per_device",
    "data_wait_share",
    "useful_share",
    "flops_per_second_per_device",
    "data/skipped",  # counts what was read ahead
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs use the first of the eight devices unless a test says otherwise."""
    create = mesh_lib.create
    monkeypatch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))


def state_of(workdir: Path, step: int, config: c.Config) -> Any:
    config = c.resolve(config, 100)
    mesh = mesh_lib.create(config.mesh)
    program = build(config, num_classes=10, total_steps=int(config.duration.amount), mesh=mesh)
    return jax.device_get(checkpoint.restore(workdir / "checkpoints" / str(step), program.state_shape)[0])


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in SPEED} for row in rows]


def assert_same_run(a: Path, b: Path, step: int, config: c.Config) -> None:
    assert rows_of(a) == rows_of(b)
    one, other = state_of(a, step, config), state_of(b, step, config)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps of 16 of 100 images: one epoch and a quarter, drop path, mixup and augmentation on."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    create = mesh_lib.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
        loop.train(tiny.config(), workdir)
    return workdir


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["step"] == 8
    assert set(result["metrics"]) == {f"validation{e}/{m}" for e in ("", "_ema") for m in ("accuracy", "loss")}
    assert result["accuracy"] == result["metrics"]["validation/accuracy"]
    assert (uninterrupted / "figure.png").stat().st_size > 10_000
    assert checkpoint.steps(uninterrupted / "checkpoints") == [4, 8]
    rows = telemetry.read_jsonl(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [0, 4, 8]
    training = next(row for row in rows if "loss" in row)
    assert (SPEED - {"data/skipped"}) | {
        "gradient_norm",
        "parameter_norm",
        "update_norm",
        "learning_rate",
        "examples",
    } <= set(training)
    record = json.loads((uninterrupted / "config.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["config"]["duration"] == {"amount": 8, "unit": "steps"}


def test_learning_rates_of_a_run_are_the_schedules(uninterrupted: Path) -> None:
    rates = [row["learning_rate"] for row in rows_of(uninterrupted) if "loss" in row]
    expected = [
        3e-3 * min(step / 2, 1.0) * (1 + max(0, step - 2) / 2) ** -0.5 * min(1.0, (8 - step) / 2) for step in range(8)
    ]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_two_halves_equal_the_whole(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by SIGTERM after step 3, in the middle of an epoch and between checkpoints; then the same command."""
    workdir = tmp_path / "halves"
    dispatched = step_log.StepLog.dispatched

    def interrupt(self: Any, step: int, metrics: Any) -> None:
        dispatched(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(step_log.StepLog, "dispatched", interrupt)
        assert loop.train(tiny.config(), workdir) == {"interrupted": 3}
    assert checkpoint.steps(workdir / "checkpoints") == [3]
    loop.train(tiny.config(), workdir)
    assert_same_run(uninterrupted, workdir, 8, tiny.config())


def test_an_evaluation_that_was_broken_off_is_made_up_for(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM before the first batch of an evaluation saves at once; the next start measures what is owed, once."""
    workdir = tmp_path / "broken"
    measured, break_off = loop.measured, {4, 8}

    def interrupt(state: Any) -> dict[str, Any]:
        if (step := int(jax.device_get(state.step))) in break_off:
            break_off.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(state)

    monkeypatch.setattr(loop, "measured", interrupt)
    assert loop.train(tiny.config(), workdir) == {"interrupted": 4}
    assert loop.train(tiny.config(), workdir) == {"interrupted": 8}
    assert checkpoint.steps(workdir / "checkpoints") == [4, 8]
    assert not (workdir / "result.json").exists()
    assert loop.train(tiny.config(), workdir)["metrics"] == loop.train(tiny.config(), uninterrupted)["metrics"]
    assert_same_run(uninterrupted, workdir, 8, tiny.config())


def test_kill_nine_at_any_moment_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    code = (
        "import sys, jax; from pathlib import Path; from tests import tiny; from vit_scaling.training import loop;"
        "from vit_scaling.parallel import mesh as m; create = m.create;"
        "m.create = lambda config: create(config, jax.devices()[:1]); loop.train(tiny.config(), Path(sys.argv[1]));"
        f"found = {test_extras.OPTIONAL} & set(sys.modules); assert not found, found"
    )
    command = [sys.executable, "-c", code, str(workdir)]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def run_until(condition: Any) -> int | None:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        return process.wait()

    def step_reached(step: int) -> Any:
        return lambda: any(row["step"] >= step for row in telemetry.read_jsonl(workdir / "metrics.jsonl"))

    def compiling() -> float:
        return json.loads((workdir / "clock.json").read_text())["seconds"]["compile"]

    assert run_until(step_reached(2)) == -signal.SIGKILL  # before the first checkpoint
    first = compiling()
    kept = list((workdir / "compiled").glob("*train_step*"))
    assert kept
    assert run_until(lambda: (workdir / "checkpoints" / "4").exists()) in (-signal.SIGKILL, 0)
    assert compiling() < first / 2  # what was kept is found again
    for entry in kept:
        entry.write_bytes(entry.read_bytes()[:1000])  # and what a kill has cut short does no harm
    assert run_until(lambda: False) == 0
    # Another process, and its config has no seed of its own: the numbers are those of this one.
    assert rows_of(workdir) == rows_of(uninterrupted)
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (workdir, uninterrupted)]
    assert metrics[0] == metrics[1]


def test_a_run_that_stopped_at_a_corrupt_image_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same workdir, to the bits of a run that skipped from the start."""
    read = BuiltinSource.__getitem__
    corrupt = order.endless(open_source(tiny.config().data.train), 0)[5 * 16 + 3]  # of step 6

    def fail(self: Any, index: int) -> dict[str, Any]:
        if len(self) == 100 and index == corrupt:
            raise CorruptImageError("made so")
        return read(self, index)

    monkeypatch.setattr(BuiltinSource, "__getitem__", fail)
    stopping, skipping = tiny.config(), tiny.config()
    skipping.data.on_corrupt = "skip"
    with pytest.raises(ValueError, match=r"is corrupt: made so \(on_corrupt=skip continues without it\)"):
        loop.train(stopping, tmp_path / "stopped")
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints") == [4]
    loop.train(skipping, tmp_path / "stopped")
    loop.train(skipping, tmp_path / "whole")
    assert telemetry.read_jsonl(tmp_path / "whole" / "metrics.jsonl")[-1]["data/skipped"] >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 8, skipping)


def test_a_finished_run_is_not_run_again(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    result = loop.train(tiny.config(), uninterrupted)
    assert result["step"] == 8
    assert "finished" in capsys.readouterr().out
    changed = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert changed == ["lock"]


def test_a_result_without_its_checkpoint_is_not_the_end(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert workdirs.past(tmp_path / "run", 8)["finished"]
    (tmp_path / "run" / "checkpoints" / "8" / "commit_success.txt").unlink()
    assert not workdirs.past(tmp_path / "run", 8)["finished"]


def test_processes_that_read_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = c.resolve(tiny.config(), 100)
    monkeypatch.setattr(workdirs.processes, "tell", lambda own: own | {"weights": "0123"})
    with pytest.raises(UserError, match=r"process 0 \(there\) and process 0 \(here\).*weights"):
        workdirs.agree(config, {}, "4567")
    workdirs.agree(config, {}, "0123")


def test_the_digest_of_weights_sees_every_number(uninterrupted: Path) -> None:
    weights = interop.read(uninterrupted)
    digest = initial.digest(weights)
    assert digest == initial.digest(interop.read(uninterrupted))
    for array in (weights.parameters["head"]["bias"], weights.parameters["norm"]["scale"]):
        before, array.flat[-1] = array.flat[-1], 0.5
        assert initial.digest(weights) not in (digest, None)
        array.flat[-1] = before
    assert initial.digest(weights) == digest


def test_a_workdir_of_another_config_is_refused_and_left_alone(uninterrupted: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    other = tiny.config(optim=c.OptimConfig(lr=1.0, ema=0.9))
    with pytest.raises(ValueError, match=r"belongs to another config: optim.lr is 0.003 there and 1.0 here"):
        loop.train(other, uninterrupted)
    assert before == {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    (tmp_path / "holiday.jpg").write_bytes(b"not a run")
    with pytest.raises(ValueError, match="holds no run of this project"):
        loop.train(tiny.config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_config_that_cannot_work_leaves_no_workdir(tmp_path: Path) -> None:
    config = tiny.config()
    for broken in (
        dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1000)),
        dataclasses.replace(config, model=tiny.model(heads=3)),
        dataclasses.replace(config, evaluation=c.EvaluationConfig(every=c.Duration(1), validation=tiny.digits("nope"))),
        dataclasses.replace(config, duration=c.Duration(1)),
        dataclasses.replace(config, log=dataclasses.replace(config.log, watchdog=-1.0)),
    ):
        with pytest.raises(ValueError, match=r"batch_size|heads|nope|do not fit|watchdog is -1") as caught:
            loop.train(broken, tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_restore_that_stands_still_is_ended_by_the_watchdog(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timer.append(seconds), raising=True)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timer.append(None))
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    (tmp_path / "run" / "result.json").unlink()

    def stuck(*_: Any) -> Any:
        assert timer == [tiny.config().log.watchdog]  # set, and not yet taken back
        raise TransientError("it stood still")

    monkeypatch.setattr(checkpoint, "restore_newest", stuck)
    with pytest.raises(TransientError, match="it stood still"):
        loop.train(tiny.config(), tmp_path / "run")
    assert timer[1:] == [None]


def test_an_export_may_take_longer_than_the_watchdog_waits(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer: list[float | None] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timer.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timer.append(None))
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    set_to: list[float | None] = []
    monkeypatch.setattr(export, "write_all", lambda *_: set_to.append(timer[-1]))
    loop.train(tiny.config(), tmp_path / "run")  # has its last checkpoint, and makes the result again
    assert set_to == [None]
    assert (tmp_path / "run" / "result.json").exists()


def test_a_workdir_that_goes_when_the_run_has_finished_is_a_sentence(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    read = workdirs.read_result

    def read_once(workdir: Path) -> Any:
        result = read(workdir)
        if result is not None:
            workdir.rename(tmp_path / "elsewhere")
        return result

    monkeypatch.setattr(workdirs, "read_result", read_once)
    with pytest.raises(TransientError, match="run is gone: it was renamed or deleted"):
        loop.train(tiny.config(), tmp_path / "run")
    assert read(tmp_path / "elsewhere") == read(uninterrupted)


@pytest.mark.parametrize(("asked", "kept"), [(1.0, 0.0), (0.3, 0.3)])
def test_small_programs_are_kept_too_unless_the_user_says_otherwise(tmp_path: Path, asked: float, kept: float) -> None:
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update(names[0], asked)
        workdirs.keep_compilations(tmp_path)
        assert jax.config.values[names[0]] == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_the_step_is_compiled_once_and_the_seed_decides(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        loop.train(tiny.config(seed=7), tmp_path / "run")
    assert rows_of(tmp_path / "run") != rows_of(uninterrupted)
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1, compiled
    assert sum("classify" in message for message in compiled) <= 1


def test_losses_that_stay_not_finite_stop_the_run(tmp_path: Path) -> None:
    config = tiny.config(optim=c.OptimConfig(name="sgd", lr=1e30, clip=None, ema=0.9))
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, stop_after_skipped=3))
    config = dataclasses.replace(config, duration=c.Duration(12))
    with pytest.raises(ValueError, match=r"not finite for 3 steps in a row.*lower optim.lr"):
        loop.train(config, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert max(row["step"] for row in rows) < 12
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_cooldown_branches_from_a_trunk(tmp_path: Path) -> None:
    """A branch is the run that was planned to end there; the trunk goes on as if nothing had happened."""

    def planned(duration: int, cooldown: int, cooldown_from: str | None = None) -> c.Config:
        schedule = c.ScheduleConfig(
            kind="rsqrt",
            warmup=c.Duration(2),
            timescale=c.Duration(2),
            cooldown=c.Duration(cooldown),
            cooldown_from=cooldown_from,
        )
        every = c.CheckpointConfig(every=c.Duration(3), keep=1, permanent=c.Duration(3))
        return tiny.config(duration, schedule=schedule, checkpoint=every)

    trunk = tmp_path / "trunk"
    loop.train(planned(8, 0), trunk)
    assert checkpoint.steps(trunk / "checkpoints") == [3, 6, 8]
    loop.train(planned(6, 3), tmp_path / "planned")
    branch = planned(8, 3, str(trunk / "checkpoints" / "3"))
    assert loop.train(branch, tmp_path / "branch")["step"] == 6
    assert [r for r in rows_of(tmp_path / "branch") if r["step"] > 3] == [
        r for r in rows_of(tmp_path / "planned") if r["step"] > 3
    ]
    # Mistakes name what is wrong.
    for broken, sentence in (
        (dataclasses.replace(branch, seed=1), "differs from its trunk in its cooldown alone, but seed is 0 there"),
        (planned(8, 0, str(trunk / "checkpoints" / "3")), "needs schedule.cooldown"),
        (planned(8, 3, str(trunk)), "name a checkpoint of a run"),
        (planned(8, 3, str(trunk / "checkpoints" / "5")), "holds no complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loop.train(broken, tmp_path / "broken")
    slower = dataclasses.replace(branch, schedule=dataclasses.replace(branch.schedule, timescale=c.Duration(3)))
    with pytest.raises(ValueError, match=r"in its cooldown alone, but schedule\.timescale"):
        loop.train(slower, tmp_path / "broken")
    cosine = dataclasses.replace(branch, schedule=dataclasses.replace(branch.schedule, kind="cosine"))
    with pytest.raises(ValueError, match="needs a schedule that does not know its end"):
        loop.train(cosine, tmp_path / "broken")


def test_a_profile_is_written_when_asked(tmp_path: Path) -> None:
    config = tiny.config(4)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, profile_from=2, profile_steps=1))
    loop.train(config, tmp_path / "run")
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_utilisation_is_flops_over_the_peak(tmp_path: Path) -> None:
    config = tiny.config(4)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, peak_flops=1e12))
    loop.train(config, tmp_path / "run")
    rows = [row for row in telemetry.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "mfu" in row]
    assert rows
    assert all(row["mfu"] == pytest.approx(row["flops_per_second_per_device"] / 1e12) for row in rows)


def test_gradient_of_nothing_is_zero() -> None:
    from vit_scaling.training.step import global_norm

    assert float(global_norm({})) == 0.0
    assert float(global_norm({"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])})) == pytest.approx(5.0)


def test_a_checkpoint_of_an_earlier_version_restores_to_the_same_bits_and_continues(tmp_path: Path) -> None:
    """tests/files/checkpoint_before: step 3 of 6, as the version of 2026-11-25 wrote it, with the hash of each leaf."""
    before = ROOT / "tests" / "files" / "checkpoint_before"
    config = tiny.config(steps=6, checkpoint=c.CheckpointConfig(every=c.Duration(3)))
    state = state_of(before, 3, config)
    hashes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            str(leaf.shape).encode() + np.asarray(leaf).tobytes()
        ).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert hashes == json.loads((before / "sha256.json").read_text())
    for name in ("checkpoints", "config.json"):
        (shutil.copytree if name == "checkpoints" else shutil.copy)(before / name, tmp_path / name)
    assert loop.train(config, tmp_path)["step"] == 6
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == [4, 5, 6]


# ---- A workdir and its side files


def test_the_result_is_rebuilt_and_damaged_side_files_are_left_out(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured again: the last row of metrics.jsonl has the numbers. And a picture never ends a run."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "result.json").write_text('{"accur')
    (workdir / "clock.json").write_text("[1]")
    rows = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    (workdir / "metrics.jsonl").write_bytes(b"\n".join([rows[0], b'{"step": "x"}', b"\xff{", b"[]", *rows[1:]]))

    def never(*args: Any, **options: Any) -> None:
        raise ValueError("made so")

    monkeypatch.setattr(Suite, "measure", never)
    monkeypatch.setattr(figure, "run_figure", never)
    result = loop.train(tiny.config(), workdir)
    assert result["metrics"] == json.loads((uninterrupted / "result.json").read_text())["metrics"]
    assert rows_of(workdir) == rows_of(uninterrupted)
    said = capsys.readouterr().out
    assert "clock.json is damaged; the seconds in the newest checkpoint are used" in said
    assert "figure.png could not be drawn: ValueError: made so" in said
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        loop.train(tiny.config(), workdir)


def test_the_result_comes_after_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a full disk is one sentence that names the intact checkpoint."""

    def full(*args: Any) -> None:
        assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
        raise RuntimeError("handle is closed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workdirs, "finish", full)
    config = tiny.config(2, schedule=c.ScheduleConfig(warmup=c.Duration(1), cooldown=c.Duration(1)))
    with pytest.raises(TransientError, match=r"the disk of .*run is full; checkpoint 2 is intact"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EDQUOT, "x"), "the disk of RUN is full; there is no checkpoint yet"),
        (ValueError("Error writing: [os_error_code='28']"), "the disk of RUN is full; there is no checkpoint yet"),
        (OSError(errno.EROFS, "x", "a"), "a file cannot be read or written (Read-only file system: a); there is no c"),
        (ValueError("UNKNOWN: [os_error_code='5']"), "a file cannot be read or written (Input/output error); there is"),
        (FileNotFoundError(errno.ENOENT, "x", "a"), None),
        (ValueError("a bug"), None),
        (UserError("a mistake"), None),
    ],
)
def test_a_disk_that_fails_is_one_sentence_and_a_bug_keeps_its_traceback(
    error: Exception, sentence: str | None, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    last = error if sentence is None else RuntimeError("handle is closed")
    last.__cause__ = None if last is error else error
    expected = type(error) if sentence is None else TransientError
    with pytest.raises(expected) as caught, loop._fault_of_disk_is_a_sentence(run):
        raise last
    assert caught.value is error or str(caught.value).startswith((sentence or "?").replace("RUN", str(run)))


def test_a_workdir_that_is_renamed_meanwhile_is_one_sentence(tmp_path: Path) -> None:
    missing = ValueError("NOT_FOUND: [os_error_code='2']")
    with pytest.raises(TransientError, match="is gone: it was"), loop._gone_workdir_is_a_sentence(tmp_path):
        raise missing
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="NOT_FOUND"), loop._gone_workdir_is_a_sentence(tmp_path):
        raise missing


def test_a_claim_that_was_killed_is_made_again_and_the_first_start_is_kept(tmp_path: Path) -> None:
    config = c.resolve(tiny.config(), 100)
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.tmp").write_text('{"con')
    (workdir / "lock").touch()
    identity = workdirs.claim(workdir, config, SETS)
    record = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(record | {"versions": {"jax": "0"}}))
    longer = dataclasses.replace(config, log=dataclasses.replace(config.log, stop_after_skipped=3))
    assert workdirs.claim(workdir, longer, SETS) == identity
    again = json.loads((workdir / "config.json").read_text())
    assert (again["versions"], again["config"]["log"]["stop_after_skipped"]) == ({"jax": "0"}, 3)
    for step in (0, 4):
        workdirs.note_start(workdir, step)
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [(row["step"], row["versions"]["jax"]) for row in starts] == [(0, jax.__version__), (4, jax.__version__)]


SETS = {"data.train": {"examples": 100, "classes": 10, "names": "a", "ids": "b"}}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("examples", 101, "data.train had 100 examples and has 101 now"),
        ("classes", 11, "data.train had 10 classes and has 11 now"),
        ("names", "c", "data.train has other class names now"),
        ("ids", "c", "data.train holds other examples, or in another order, now"),
    ],
)
def test_a_set_that_changed_between_two_starts_is_refused(
    field: str, value: Any, sentence: str, tmp_path: Path
) -> None:
    config = c.resolve(tiny.config(), 100)
    workdirs.claim(tmp_path / "run", config, SETS)
    with pytest.raises(UserError, match=sentence):
        workdirs.claim(tmp_path / "run", config, {"data.train": SETS["data.train"] | {field: value}})


def test_package_without_metadata(monkeypatch):
    """A package that was copied into place, without its metadata, does not stop a run."""
    monkeypatch.setattr(workdirs, "PACKAGES", (*workdirs.PACKAGES, "no-such-package"))
    assert workdirs.environment()["versions"]["no-such-package"] == "unknown"


def test_a_start_does_not_import_what_only_its_end_needs():
    code = "import sys, vit_scaling.training.loop; print({'matplotlib', 'tensorflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"


def test_freed_memory_goes_back_to_the_system() -> None:
    """glibc keeps what lies below memory in use; blocks of 100 kB are of the size that it keeps."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [bytearray(100_000) for _ in range(1000)]
    held, last = resident(), blocks[-1]
    del blocks
    loop._give_memory_back()
    assert held - resident() > 50_000_000
    assert len(last) == 100_000
