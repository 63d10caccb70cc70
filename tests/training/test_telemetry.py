"""Metrics files survive what happens to them; clocks book what was done."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests import tiny
from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.training import figure, telemetry
from vit_scaling.training.step_log import StepLog


def test_rows_after_the_restored_step_are_dropped_and_none_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo'
    )
    writer = telemetry.JsonlWriter(path, resume_step=2)
    writer.write_scalars(3, {"loss": 7.0})
    # Written at once: a process that is killed now has lost nothing.
    assert telemetry.read_jsonl(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 7.0}]
    writer.close()


def test_a_run_that_begins_anew_keeps_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "validation/accuracy": 0.1}\n')
    telemetry.JsonlWriter(path, resume_step=None).close()
    assert path.read_text() == ""


def test_what_is_no_number_is_written_as_null(tmp_path: Path) -> None:
    writer = telemetry.JsonlWriter(tmp_path / "metrics.jsonl", resume_step=0)
    writer.write_scalars(1, {"loss": math.nan, "norm": math.inf, "lr": 0.5})
    writer.close()
    assert telemetry.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "norm": None, "lr": 0.5}]


def test_event_files_of_two_starts_within_a_second_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.time, "time", lambda: 1e9)
    for step in (1, 2):
        writer = telemetry.TensorBoardWriter(tmp_path, resume_step=step)
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_tensorboard_files_hold_the_values(tmp_path: Path) -> None:
    from tensorboardX.event_file_writer import EventsWriter  # noqa: F401  the writer needs no TensorFlow
    from tensorboardX.proto import event_pb2

    writer = telemetry.TensorBoardWriter(tmp_path, resume_step=0)
    writer.write_scalars(5, {"loss": 0.25})
    writer.close()
    data = next(tmp_path.iterdir()).read_bytes()
    found = []
    while data:  # a record: length (8), checksum (4), payload, checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert found == [(5, "loss", 0.25)]


def test_skipped_updates_are_said_with_their_count_and_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    config = tiny.config(200, log=c.LogConfig(every=c.Duration(100), stop_after_skipped=10))
    progress = telemetry.Progress(0, 200)
    progress.say = said.append  # type: ignore[method-assign]
    log = StepLog(config, tmp_path, 10, telemetry.Writers(), progress, telemetry.Clock(), 0)
    for step, in_row in enumerate([0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], start=1):
        log.dispatched(step, {"loss": jnp.float32(1), "skipped_in_row": jnp.int32(in_row)})
    with pytest.raises(UserError, match=r"not finite for 10 steps in a row.*up to step 13"):
        log.drain()
    assert [line.partition(":")[0] for line in said] == ["step 2", "step 4", "step 5", "step 7", "step 11"]
    assert "(8 in a row)" in said[-1]


class FakeTime:
    """A clock that moves only when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_every_second_is_booked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime()
    monkeypatch.setattr(telemetry, "time", fake)
    clock = telemetry.Clock(started=fake.now - 3.0)
    with clock.book("evaluation"):
        fake.now += 0.25
        with clock.book("data"):
            fake.now += 0.5
        fake.now += 0.125
    clock.book_rest("step")
    assert clock.seconds == {"data": 0.5, "evaluation": 0.375, "step": 3.0}
    assert clock.total == 3.875
    assert clock.useful_share == 3.0 / 3.875


def test_what_xla_compiles_is_booked_as_such_wherever_it_happens() -> None:
    with telemetry.Clock() as clock:
        with clock.book("evaluation"):
            jax.jit(lambda x: jax.numpy.sin(x) @ x)(np.ones((3, 3), np.float32)).block_until_ready()
        clock.book_rest("step")
    assert 0 < clock.seconds["compile"] < clock.total
    assert clock.seconds["evaluation"] + clock.seconds["compile"] == pytest.approx(clock.total, abs=0.01)
    jax.jit(lambda x: jax.numpy.cos(x) @ x)(np.ones((3, 3), np.float32))
    assert clock.total == sum(clock.seconds.values())
    compiled = clock.seconds["compile"]
    jax.jit(lambda x: jax.numpy.tan(x) @ x)(np.ones((3, 3), np.float32))
    assert clock.seconds["compile"] == compiled  # it listens no longer


def test_a_clock_goes_on_where_the_last_process_was_seen() -> None:
    saved = {"start": 5.0, "step": 10.0}
    # Killed six seconds after the checkpoint of step 4, at step 6: those steps are run again.
    killed = telemetry.Clock()
    killed.resume(4, saved, 6, {"start": 5.0, "step": 15.0, "data": 1.0})
    assert killed.seconds == saved | {"lost": 6.0}
    killed.book_rest("step")
    assert killed.seconds["step"] == pytest.approx(10.0, abs=0.05)
    # Stopped in good order at step 4, and then closed its checkpoint: nothing is lost.
    stopped = telemetry.Clock()
    stopped.resume(4, saved, 4, saved | {"checkpoint": 2.0})
    assert stopped.seconds == saved | {"checkpoint": 2.0}
    # Killed right after a checkpoint: its seconds are newer than what was noted.
    newer = telemetry.Clock()
    newer.resume(4, saved, 4, {"start": 5.0, "step": 9.0})
    assert newer.seconds == saved


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42s"), (190.0, "3m10s"), (7500.0, "2h05m"), (math.nan, "?")])
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert telemetry.duration(seconds) == text


def test_a_line_tells_step_values_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = telemetry.Progress(step=10, total=20)
    progress.show(15, {"loss": 0.5})
    line = capsys.readouterr().err
    assert line.startswith("step 15/20, loss 0.5, ")
    assert line.rstrip().endswith("left")


def test_the_figure_labels_logarithmic_axes_with_plain_numbers_that_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a wide range and over a narrow one; long class names are cut, and "$" is no formula."""
    kept: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *args, **kw: (kept.append(self), save(self, *args, **kw))
    )
    for low in (0.006, 6.0):
        rows = [{"step": step, "loss": value, "gradient_norm": 1.0} for step, value in ((1, low), (2, 6.6))]
        names, image = ["an exceptionally long name", "$x"], np.zeros((8, 8, 3), np.uint8)
        told = {"images": [image] * 2, "labels": names, "predictions": names[::-1]}
        figure.run_figure(tmp_path / "run.png", rows, title="run", **told)
        renderer = FigureCanvasAgg(kept[-1]).get_renderer()
        loss = next(axes for axes in kept[-1].axes if axes.get_title() == "loss")
        texts = [text for text in loss.yaxis.get_ticklabels(which="both") if text.get_text()]
        bottom, top = loss.get_ylim()
        shown = [text for text in texts if bottom <= float(text.get_text()) <= top]  # all are plain numbers
        assert 3 <= len(shown) <= 10
        titles = [axes.title for axes in kept[-1].axes if axes.get_title().startswith(("an exc", "$x"))]
        assert [title.get_text() for title in titles] == ["$x\nnot an exception…", "an exception…\nnot $x"]
        for group in (shown, titles):
            boxes = [text.get_window_extent(renderer) for text in group]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_figure_shows_a_run_with_and_without_images(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "validation/loss": 2.0, "validation/accuracy": 0.1, "fewshot/5shot": 0.2},
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "gradient_norm": 1.0},
        {"step": 2, "loss": None, "learning_rate": 0.2, "gradient_norm": None},
    ]
    image = np.zeros((8, 8, 3), np.uint8)
    for name, images in (("with.png", [image] * 3), ("without.png", [])):
        labels = ["a"] * len(images)
        figure.run_figure(tmp_path / name, rows, title="run", images=images, labels=labels, predictions=labels)
    with_size, without_size = ((tmp_path / name).stat().st_size for name in ("with.png", "without.png"))
    assert with_size > without_size > 10_000


def test_a_log_has_a_line_for_a_state_only_where_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    progress = telemetry.Progress(step=0, total=2)
    progress.doing("evaluating")
    progress.doing("compiling", line=True)
    assert capsys.readouterr().err == "compiling\n"
