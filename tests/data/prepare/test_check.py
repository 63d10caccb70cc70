"""prepare --list, --check, --sheet and --strict; inputs of every kind; what goes on after an interruption."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests import commands
from tests.data.pictures import JPEG, encoded, make, write_tar
from vit_scaling import UserError
from vit_scaling.data import records, sources
from vit_scaling.data.prepare import check, inputs, job, shards
from vit_scaling.data.prepare.shards import Work
from vit_scaling.data.sources import SourceConfig, open_source

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> None:
    """Runs the command in this process."""
    with commands.loaded("prepare", *arguments) as module:
        flags.FLAGS(["prepare", *arguments])
        module.main(["prepare"])


def prepare(source: SourceConfig, output: Path, shard_examples: int = 2, strict: bool = False, **work) -> dict:
    return job.prepare(
        source, output, work=Work(**work), shard_examples=shard_examples, workers=0, exclude=[], strict=strict
    )


def images_of(output: Path, split: str) -> list[tuple[bytes, int]]:
    source = open_source(SourceConfig("array_record", str(output), split))
    return sorted((bytes(source[i]["image"]), int(source[i]["label"])) for i in range(len(source)))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    for number in range(6):
        make(root, f"{('cat', 'dog')[number % 2]}/{number}.png", content=encoded(number))
    return root


# ---- what would be read ----------------------------------------------------------------------------------------------


def test_list_says_what_is_read_and_what_is_not(folder, tmp_path, capsys):
    make(folder, "cat/1.heic", content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    make(folder, "cat/.hidden", "stray.png")
    run(f"--input={folder}", "--list", f"--sheet={tmp_path / 'sheet.png'}")
    output = capsys.readouterr().out
    assert "all: 6 images in 2 classes\n    cat 3, dog 3\n" in output
    assert "left out 1 (cat/1.heic): HEIC files, which cannot be decoded here" in output
    assert "left out 1 (stray.png): images outside of class folders" in output
    assert "ignored 1 (cat/.hidden)" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 72, 160 + 8 * 72, 3)
    assert (sheet[:72, 160:] < 250).any(axis=(0, 2)).sum() >= 3 * 8  # three tiles of cats
    with pytest.raises(UserError, match=r"--strict allows nothing to be left out: left out 1 .*; left out 1"):
        run(f"--input={folder}", "--list", "--strict")
    with pytest.raises(UserError, match="--strict allows nothing"):
        run(f"--input={folder}", f"--output={tmp_path / 'out'}", "--strict")
    assert not (tmp_path / "out").exists()


def test_check_decodes_every_image(folder, capsys):
    run(f"--input={folder}", "--check")
    (folder / "dog" / "1.png").write_bytes(encoded(1)[:-30])
    with pytest.raises(UserError, match="1 of 6 images are corrupt; prepare leaves them out with --on_corrupt=skip"):
        run(f"--input={folder}", "--check")
    assert "dog/1.png is corrupt: " in capsys.readouterr().out


def test_every_kind_of_input_is_counted(folder, tmp_path):
    rows = [(encoded(number), number % 2) for number in range(6)]
    write_tar(tmp_path / "tars" / "train-0.tar.gz",
              [(f"{i}.{kind}", content) for i, (image, label) in enumerate(rows)
               for kind, content in (("png", image), ("cls", b"%d" % label))], "w:gz")  # fmt: skip
    prepare(SourceConfig("folder", str(folder)), tmp_path / "set")
    kinds = {str(folder): "all", str(tmp_path / "tars"): "train", str(tmp_path / "set"): "all"}
    for name, split in kinds.items():
        content = inputs.list_input(sources.parse(name))
        counts = check.count_classes(content)
        assert counts == {split: {0: 3, 1: 3}}
        assert f"{split}: 6 images in 2 classes" in list(inputs.describe(content, counts))
        output = tmp_path / f"from-{Path(name).name}"
        manifest = prepare(sources.parse(name), output)
        assert images_of(output, split) == sorted(rows)
        assert manifest["splits"][split]["classes"] == {"0": 3, "1": 3}
        assert not [path for path in output.iterdir() if path.name.startswith(".")]
    builtin = inputs.list_input(SourceConfig("builtin", "mnist"))
    assert {split: len(items) for split, items in builtin.splits.items()} == {
        "train": 4000, "validation": 500, "test": 500}  # fmt: skip


def test_parquet_becomes_array_record(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": encoded(i), "path": None} for i in range(5)], "label": [0, 1, 0, -1, 1]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "train-00000-of-00001.parquet", row_group_size=2)
    manifest = prepare(sources.parse(str(tmp_path / "in")), tmp_path / "set")
    assert images_of(tmp_path / "set", "train") == sorted((encoded(i), i % 2 if i < 3 else 1) for i in (0, 1, 2, 4))
    assert manifest["splits"]["train"]["classes"] == {"0": 2, "1": 2}


def test_unlabelled_records_are_left_out_and_counted(tmp_path, monkeypatch):
    items = [inputs.Item(str(i), label, np.full((4, 4), i, np.uint8)) for i, label in enumerate((0, -1, 1, -1))]
    entry = shards.write_shard(tmp_path / "a.array_record", items, Work(), np.array([], np.uint64))
    assert (entry["num_examples"], entry["unlabelled"], entry["classes"]) == (2, ["1", "3"], {"0": 1, "1": 1})


def test_names_of_any_bytes_are_prepared(tmp_path):
    import os

    for name in (b"caf\xe9", b"b\nc"):
        os.makedirs(os.path.join(os.fsencode(tmp_path / "in"), name))
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "in"), name, b"\xff.png"))).write_bytes(encoded(1))
    manifest = prepare(SourceConfig("folder", str(tmp_path / "in")), tmp_path / "set")
    assert manifest["class_names"] == ["b\nc", "caf\udce9"]
    assert shards.verify(tmp_path / "set") == {"all": 2}


# ---- interruption ----------------------------------------------------------------------------------------------------


def test_a_run_that_stopped_at_a_bad_file_goes_on_without_it(folder, tmp_path):
    source, output = SourceConfig("folder", str(folder)), tmp_path / "set"
    (folder / "dog" / "9.png").write_bytes(JPEG[:100])
    with pytest.raises(UserError, match=r"dog/9.png is corrupt: .*; with --on_corrupt=skip the same command continues"):
        prepare(source, output, shard_examples=1)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("all-*")}
    manifest = prepare(source, output, shard_examples=1, on_corrupt="skip", max_bytes=2 * Work.max_bytes)
    assert manifest["splits"]["all"]["corrupt"] == ["dog/9.png"]
    assert manifest["splits"]["all"]["num_examples"] == 6
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_flags_that_would_change_written_records_are_refused(folder, tmp_path, monkeypatch):
    source, output = SourceConfig("folder", str(folder)), tmp_path / "set"
    (folder / "cat" / "0.png").write_bytes(b"")
    monkeypatch.setattr(job, "_write_manifest", lambda *rest: 1 / 0)  # stopped at the very end
    with pytest.raises(ZeroDivisionError):
        prepare(source, output, on_corrupt="skip")
    with pytest.raises(UserError, match=r"left out cat/0.png as corrupt; continue with --on_corrupt=skip"):
        prepare(source, output, on_corrupt="error")
    with pytest.raises(UserError, match="differs in max_bytes"):
        prepare(source, output, on_corrupt="skip", max_bytes=10)
    with pytest.raises(UserError, match="differs in quality"):
        prepare(source, output, on_corrupt="skip", quality=50)


def test_a_finished_shard_of_another_size_is_written_again(folder, tmp_path, monkeypatch):
    source, output = SourceConfig("folder", str(folder)), tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(job, "_write_manifest", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(source, output)
    first, second, _ = sorted(output.glob("all-*"))
    first.write_bytes(first.read_bytes()[:-1])
    time = second.stat().st_mtime_ns
    prepare(source, output)
    assert shards.verify(output) == {"all": 6}
    assert second.stat().st_mtime_ns == time


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=IN"], "--output is missing"),
        (["--input=gs://bucket/x", "--output=OUT"], r"--input=gs://bucket/x is in a bucket; prepare reads local files"),
        (["--input=IN", "--output=OUT", "--sheet=a.png"], "--sheet needs --list or --check"),
        (["--input=nowhere", "--list"], "'nowhere' is neither a file nor a folder, nor KIND:NAME"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(folder, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*[a.replace("IN", str(folder)).replace("OUT", str(tmp_path / "out")) for a in arguments])
    assert not (tmp_path / "out").exists()


def test_home_is_expanded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("--input=~/in", "--output=~/set", "--workers=0")
    assert (tmp_path / "set" / records.MANIFEST).exists()
    assert "Train on it: --config.data.train.kind=array_record" in capsys.readouterr().out
    assert len(open_source(SourceConfig("array_record", "~/set", "all"))) == 6
    assert len(open_source(SourceConfig("folder", "~/in", "all"))) == 6


# ---- hostile input ---------------------------------------------------------------------------------------------------


def test_hostile_files_take_little_memory(tmp_path):
    """Each of these took gigabytes or forever; here 1 GiB of address space above the idle process is enough."""
    idx = tmp_path / "idx"
    idx.mkdir()
    zeros = gzip.compress(bytes(32 << 20), 1)  # gzip members may follow each other
    head = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 10, 28, 28))
    (idx / "train-images-idx3-ubyte.gz").write_bytes(head + 60 * zeros)
    with gzip.open(idx / "train-labels-idx1-ubyte.gz", "wb") as stream:
        stream.write(struct.pack(">HBBI", 0, 8, 1, 10) + bytes(10))
    claims = tmp_path / "claims"
    claims.mkdir()
    for name, shape in (("images-idx3", (2**31, 28, 28)), ("labels-idx1", (10,))):
        head = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        (claims / f"train-{name}-ubyte").write_bytes(head + bytes(10))
    table = make(tmp_path / "table", "a/1.png")
    with open(table / "train.csv", "wb") as stream:
        stream.write(b"file,label\n")
        stream.truncate(3 << 30)  # one line of zeros, sparse
    tar = tmp_path / "tar"
    tar.mkdir()
    with open(tar / "train-0.tar", "wb") as stream:
        import tarfile

        member = tarfile.TarInfo("x")
        member.type, member.size = tarfile.XHDTYPE, 2 << 30
        stream.write(member.tobuf(tarfile.USTAR_FORMAT))
        stream.truncate(3 << 30)
    code = f"""if True:
        import resource, sys
        from vit_scaling import UserError
        from vit_scaling.data.prepare import inputs
        from vit_scaling.data import sources
        from vit_scaling.data.sources import arrays, folders, tars, parquet
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
        for name in ("idx", "claims", "table", "tar"):
            try:
                inputs.list_input(sources.parse({str(tmp_path)!r} + "/" + name))
            except UserError as error:
                print(name, "refused:", error)
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "refused:"] for name in ("idx", "claims", "table", "tar")]
    assert "says (10, 28, 28) values and holds more" in lines[0]
    assert "more than the 700,000,000 that are read" in lines[1]
