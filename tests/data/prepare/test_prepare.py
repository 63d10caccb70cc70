"""prepare: what goes in comes out once, whatever kills it; what is unsafe, damaged or too near is kept out."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from tests import children
from vit_scaling.data import records, sources
from vit_scaling.data.images import codec
from vit_scaling.data.prepare import job as prepare
from vit_scaling.data.prepare import shards
from vit_scaling.data.prepare.shards import Work
from vit_scaling.data.sources import SourceConfig, open_source

ROOT = Path(__file__).parents[3]


def scene(number: int, height=60, width=80) -> np.ndarray:
    """A smooth image unlike those of other numbers."""
    coarse = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray, quality=90) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@pytest.fixture
def images(tmp_path):
    """IMAGES/{train,val}/{cat,dog}/N.jpg: 20 and 5."""
    for number in range(25):
        path = tmp_path / "images" / ("train" if number < 20 else "val") / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(scene(number)))
    return tmp_path / "images"


def run(folder, output, *, shard_examples=6, workers=0, exclude=(), **work):
    source = folder if isinstance(folder, SourceConfig) else sources.parse(str(folder))
    exclude = [sources.parse(str(path)) for path in exclude]
    return prepare.prepare(
        source, output, work=Work(**work), shard_examples=shard_examples, workers=workers, exclude=exclude
    )


def read(output, split):
    """{id: (label, stored image)} of a prepared split, in its order."""
    source = open_source(SourceConfig("array_record", str(output), split))
    rows = []
    for i in range(len(source)):
        number, path = re.fullmatch(r"record (\d+) of (.*)", source.id(i)).groups()
        header, _ = records.unpack(ArrayRecordDataSource(path)[int(number)])
        rows.append((header["id"], source[i]))
    assert len({identity for identity, _ in rows}) == len(rows)
    return {identity: (np.asarray(row["label"]).tolist(), row["image"]) for identity, row in rows}


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "vit_scaling.prepare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_folder_comes_out_as_it_went_in(images, tmp_path):
    manifest = run(images, tmp_path / "set")
    assert {split: content["num_examples"] for split, content in manifest["splits"].items()} == {"train": 20, "val": 5}
    assert [shard["num_examples"] for shard in manifest["splits"]["train"]["shards"]] == [6, 6, 6, 2]
    assert (manifest["num_classes"], manifest["class_names"], manifest["multi_label"]) == (2, ["cat", "dog"], False)
    for split, numbers in (("train", range(20)), ("val", range(20, 25))):
        expected = {}
        for number in numbers:
            name = f"{split}/{('cat', 'dog')[number % 2]}/{number}.jpg"
            expected[name] = (number % 2, (images / name).read_bytes())
        assert read(tmp_path / "set", split) == expected
    order = list(read(tmp_path / "set", "train"))
    assert order != sorted(order)  # shuffled, so that a cut holds every class
    assert shards.verify(tmp_path / "set") == {"train": 20, "val": 5}
    assert not [path for path in (tmp_path / "set").iterdir() if path.name.startswith(".")]


def test_worker_processes_write_the_same_files(images, tmp_path):
    one, two = run(images, tmp_path / "one"), run(images, tmp_path / "two", workers=2)
    assert one == two


def test_array_record_source_cuts_across_shards_and_pickles(images, tmp_path):
    run(images, tmp_path / "set")
    everything = list(read(tmp_path / "set", "train+val").items())
    assert list(read(tmp_path / "set", "train[5:13]").items()) == everything[5:13]
    assert list(read(tmp_path / "set", "train[90%:]+val[:2]").items()) == everything[18:22]
    source = open_source(SourceConfig("array_record", str(tmp_path / "set"), "train[5:]"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3]["image"] == source[3]["image"]
    assert (copy.num_classes, copy.class_names) == (2, ("cat", "dog"))
    (tmp_path / "set" / records.MANIFEST).write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="is of format 'another'"):
        open_source(SourceConfig("array_record", str(tmp_path / "set")))


def test_tables_make_multi_label_records(images, tmp_path):
    (images / "both.csv").write_text("file,labels\ntrain/cat/0.jpg,red;blue\ntrain/dog/1.jpg,\nval/cat/20.jpg,red\n")
    manifest = run(images, tmp_path / "set")
    assert (manifest["multi_label"], manifest["class_names"]) == (True, ["blue", "red"])
    got = {identity: label for identity, (label, _) in read(tmp_path / "set", "both").items()}
    assert got == {"train/cat/0.jpg": [1, 1], "train/dog/1.jpg": [0, 0], "val/cat/20.jpg": [0, 1]}


def test_idx_files_keep_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (10, 5, 7), np.uint8), np.arange(10, dtype=np.uint8) % 3
    (tmp_path / "idx").mkdir()
    for name, array, rank in (("images", pixels, 3), ("labels", labels, 1)):
        head = bytes([0, 0, 8, rank]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
        (tmp_path / "idx" / f"train-{name}-idx{rank}-ubyte").write_bytes(head + array.tobytes())
    run(tmp_path / "idx", tmp_path / "set")
    rows = read(tmp_path / "set", "train")
    assert {identity: label for identity, (label, _) in rows.items()} == {f"train/{i}": i % 3 for i in range(10)}
    for i in range(10):
        np.testing.assert_array_equal(rows[f"train/{i}"][1], pixels[i])


@pytest.mark.parametrize(
    ("work", "size"),
    [({"shorter_side": 30}, (30, 40)), ({"longer_side": 40}, (30, 40)), ({"longer_side": 200}, (60, 80))],
)
def test_large_images_shrink_and_small_ones_stay_as_they_are(images, tmp_path, work, size):
    run(images, tmp_path / "set", **work)
    for identity, (_, data) in read(tmp_path / "set", "val").items():
        image = codec.decode(data)
        assert image.shape[:2] == size
        original = (images / identity).read_bytes()
        assert (data == original) == (size == (60, 80))
        if size != (60, 80):
            smaller = cv2.resize(codec.decode(original), size[::-1], interpolation=cv2.INTER_AREA)
            reference = codec.decode(jpeg(smaller, 95))  # by OpenCV's encoder, 4:2:0 too
            assert np.abs(image.astype(int) - reference).mean() < 2  # two encoders of the same pixels


# ---- interruption ----------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_without_a_lost_or_doubled_image(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(150):
        (folder / f"{number}.jpg").write_bytes(jpeg(scene(number, 240, 320), 80))
    arguments = [f"--input={folder.parent}", f"--output={tmp_path / 'set'}", "--shard_examples=3", "--workers=0"]
    for least in (2, 12):  # twice, further each time
        process = command(*arguments)
        while process.poll() is None and len(list((tmp_path / "set").glob("all-*"))) < least:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    journal = (tmp_path / "set" / prepare.JOB).read_text()
    assert not (tmp_path / "set" / records.MANIFEST).exists()
    finished = len(list((tmp_path / "set").glob("all-*")))
    assert 12 <= finished < 50
    (tmp_path / "set" / prepare.JOB).write_text(journal + '{"file": "all-00')  # a line that was being written
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("all-*")}
    process = command(*arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "150 images in 50 shards" in output
    kept = [name for name, t in times.items() if (tmp_path / "set" / name).stat().st_mtime_ns == t]
    assert len(kept) >= finished - 1  # all but perhaps one whose line was not yet written
    whole = run(folder.parent, tmp_path / "whole", shard_examples=3)
    assert json.loads((tmp_path / "set" / records.MANIFEST).read_text()) == whole
    assert shards.verify(tmp_path / "set") == {"all": 150}


def test_writing_processes_end_with_the_one_that_began_them(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(150):
        (folder / f"{number}.jpg").write_bytes(jpeg(scene(number, 480, 640), 80))
    process = command(f"--input={folder.parent}", f"--output={tmp_path / 'set'}", "--shard_examples=1", "--workers=2")
    while process.poll() is None and len(list((tmp_path / "set").glob("all-*"))) < 4:
        time.sleep(0.01)
    writers = children.of(process.pid)
    assert len(writers) >= 2
    process.kill()
    process.wait()
    assert children.end(writers)


def test_an_output_of_another_job_is_refused_and_left_alone(images, tmp_path):
    (images / "train" / "cat" / "bad.jpg").write_bytes(b"")
    with pytest.raises(codec.CorruptImageError):
        run(images, tmp_path / "set")
    before = sorted((tmp_path / "set").iterdir())
    with pytest.raises(ValueError, match="unfinished run that differs in shorter_side"):
        run(images, tmp_path / "set", shorter_side=50)
    (images / "train" / "cat" / "bad.jpg").unlink()
    with pytest.raises(ValueError, match="unfinished run that differs in listing"):
        run(images, tmp_path / "set")
    assert sorted((tmp_path / "set").iterdir()) == before
    run(images, tmp_path / "other")
    with pytest.raises(ValueError, match="already holds a prepared set"):
        run(images, tmp_path / "other")
    (tmp_path / "other" / records.MANIFEST).unlink()
    with pytest.raises(ValueError, match="shards without a manifest"):
        run(images, tmp_path / "other")


# ---- what is kept out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_stop_the_run_or_are_left_out_and_listed(images, tmp_path, workers):
    (images / "train" / "cat" / "bad.jpg").write_bytes((images / "train" / "cat" / "0.jpg").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"train/cat/bad.jpg is corrupt: .*cut off"):
        run(images, tmp_path / "strict", workers=workers)
    manifest = run(images, tmp_path / "set", on_corrupt="skip", workers=workers)
    assert manifest["splits"]["train"]["corrupt"] == ["train/cat/bad.jpg"]
    assert manifest["splits"]["train"]["num_examples"] == 20
    assert "train/cat/bad.jpg" not in read(tmp_path / "set", "train")


def test_files_over_the_size_limit_count_as_corrupt(images, tmp_path):
    with pytest.raises(codec.CorruptImageError, match="more than max_bytes = 100"):
        run(images, tmp_path / "set", max_bytes=100)


def test_near_duplicates_of_evaluation_images_are_removed(images, tmp_path):
    evaluation = tmp_path / "evaluation" / "x"
    evaluation.mkdir(parents=True)
    (evaluation / "same.jpg").write_bytes(jpeg(scene(4)))
    (evaluation / "smaller.jpg").write_bytes(jpeg(cv2.resize(scene(5), (53, 40), interpolation=cv2.INTER_AREA), 60))
    brighter = np.clip(cv2.resize(scene(6), (200, 150)).astype(float) * 1.1 + 5, 0, 255)
    (evaluation / "brighter.png").write_bytes(cv2.imencode(".png", brighter.astype(np.uint8)[..., ::-1])[1].tobytes())
    (evaluation / "other.jpg").write_bytes(jpeg(scene(1000)))
    (evaluation / "unreadable.jpg").write_bytes(b"")
    manifest = run(images, tmp_path / "set", exclude=[evaluation.parent])
    removed = sorted(manifest["splits"]["train"]["near_duplicates"])
    assert removed == ["train/cat/4.jpg", "train/cat/6.jpg", "train/dog/5.jpg"]
    assert manifest["splits"]["train"]["num_examples"] == 17
    assert manifest["splits"]["val"]["near_duplicates"] == []
    prepared = run(images, tmp_path / "again", exclude=[tmp_path / "set"])  # a prepared set can be excluded too
    assert sum(split["num_examples"] for split in prepared["splits"].values()) == 3


def test_perceptual_hashes_of_unrelated_images_are_far_apart():
    hashes = np.array([shards.perceptual_hash(scene(number)) for number in range(300)])
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(300, 1)]
    assert bits.min() > Work.distance
    assert 28 < bits.mean() < 34  # half of 63


# ---- tar shards ------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_tar_shards_of_webdataset(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    data = {number: jpeg(scene(number)) for number in range(6)}
    for shard in range(2):
        write_tar(
            folder / f"train-{shard:04d}.tar",
            [(f"{n:03d}.{kind}", content) for n in range(shard * 2, shard * 2 + 2)
             for kind, content in (("jpg", data[n]), ("cls", str(n % 3).encode()), ("txt", b"ignored"))],
        )  # fmt: skip
    write_tar(
        folder / "val.tar",
        [
            ("d/4.jpg", data[4]),
            ("d/4.json", b'{"label": 1}'),
            ("d/5.jpg", data[5]),
            ("d/5.json", b'{"label": 2, "x": 0}'),
        ],
    )
    manifest = run(folder, tmp_path / "set")
    assert manifest["num_classes"] == 3
    assert read(tmp_path / "set", "train") == {
        f"train-{n // 2:04d}.tar/{n:03d}.jpg": (n % 3, data[n]) for n in range(4)
    }
    assert read(tmp_path / "set", "val") == {f"val.tar/d/{n}.jpg": (n % 3, data[n]) for n in (4, 5)}


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


BAD_TARS = {
    "climbs": ([("../../etc/1.jpg", b"x"), ("../../etc/1.cls", b"0")], "leaves the archive's folder"),
    "absolute": ([("/etc/1.jpg", b"x"), ("/etc/1.cls", b"0")], "leaves the archive's folder"),
    "symbolic link": ([(special("1.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")], "is a link"),
    "hard link": ([(special("1.jpg", tarfile.LNKTYPE, "2.jpg"), b"")], "is a link"),
    "device": ([(special("1.jpg", tarfile.CHRTYPE), b"")], "a device"),
    "no label": ([("1.jpg", b"x")], "holds 1.jpg without a label; 1.cls or 1.json should hold it"),
    "two images": ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"0")], "images of the same key"),
    "bad json": ([("1.jpg", b"x"), ("1.json", b"{")], "1.json at byte 1536 holds no label"),
    "large image": ([("1.jpg", b"x" * 2000), ("1.cls", b"0")], "2000 bytes, more than 1000"),
    "large label": ([("1.jpg", b"x"), ("1.cls", b"0" * (1 << 21))], "too many for a label"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_unsafe_and_broken_archives_are_refused_before_anything_is_written(tmp_path, name):
    members, message = BAD_TARS[name]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "train-0.tar", members)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "in", tmp_path / "set", max_bytes=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_cut_archives_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train-0.tar"
    write_tar(path, [("1.cls", b"0"), ("1.jpg", jpeg(scene(1)))])
    whole = path.read_bytes()
    path.write_bytes(whole[:1800])
    with pytest.raises(ValueError, match=r"train-0\.tar (is cut off|cannot be read)"):
        run(tmp_path / "in", tmp_path / "set")


# ---- verify and the command ------------------------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(images, tmp_path):
    output = tmp_path / "set"
    manifest = run(images, output)
    shard = output / manifest["splits"]["train"]["shards"][1]["file"]
    good = shard.read_bytes()
    shard.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        shards.verify(output)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        shards.verify(output)
    shard.write_bytes(good)

    def with_manifest(**changes):
        (output / records.MANIFEST).write_text(json.dumps(manifest | changes))
        shards.verify(output)

    with pytest.raises(ValueError, match=r"has label \[1\], and there are 1 classes"):
        with_manifest(num_classes=1)
    twice = json.loads(json.dumps(manifest["splits"]))
    twice["train"]["shards"].append(twice["train"]["shards"][0])
    with pytest.raises(ValueError, match="is there twice"):
        with_manifest(splits=twice)
    fewer = json.loads(json.dumps(manifest["splits"]))
    fewer["val"]["num_examples"] = 4
    with pytest.raises(ValueError, match="split val holds 5 examples, and the manifest says 4"):
        with_manifest(splits=fewer)


def test_verify_decodes_every_image(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "prepare_image", lambda item, work, excluded: (b"\xff\xd8 no image", 0, ""))
    run(images, tmp_path / "set")
    with pytest.raises(ValueError, match=r"array_record record 0 \(train/.*\) is corrupt"):
        shards.verify(tmp_path / "set")


def test_the_command_prepares_and_verifies(images, tmp_path):
    process = command(f"--input={images}", f"--output={tmp_path / 'set'}", "--workers=1")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "train: 20 images in 1 shards; 0 corrupt, 0 near-duplicates left out" in output
    process = command(f"--output={tmp_path / 'set'}", "--verify")
    assert f"{tmp_path / 'set'} is complete: train 20, val 5" in process.communicate(timeout=120)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=OUT", "--verify"], "OUT holds no manifest.json: there is nothing to verify"),
        (["--output=OUT"], "--input is missing"),
        (["--input=nowhere", "--output=OUT"], "'nowhere' is neither a file nor a folder"),
        (["--input=tests"], "--output is missing"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, arguments, message):
    output = str(tmp_path / "out")
    process = command(*[argument.replace("OUT", output) for argument in arguments])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message.replace("OUT", output) in errors
    assert "Traceback" not in errors
    assert not os.path.exists(output)


def test_a_prepared_set_trains_by_its_path(images, tmp_path):
    from vit_scaling.data import config, loader
    from vit_scaling.data.images import transforms

    run(images, tmp_path / "set")
    source = sources.open_source(SourceConfig("array_record", str(tmp_path / "set"), "train"))
    transform = transforms.transform(transforms.TransformConfig((16, 16)), train=True)
    batches = loader.train_batches(source, transform, config.DataConfig(batch_size=20), seed=0)
    assert np.bincount(next(batches)["label"]).tolist() == [10, 10]
