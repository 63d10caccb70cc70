"""Webdataset's tar shards: damage is an error with shard and offset, and every sample is read or counted."""

import gzip
import io
import tarfile

import pytest

from tests.data.pictures import PNG, encoded, write_tar
from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, list_splits, listing, open_source, tars


def sample(key: str, label: object = 0, image: bytes = PNG) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image), (f"{key}.cls", str(label).encode())]


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [member for i in range(start, start + count) for member in sample(f"{i:03d}", i % 2, encoded(i))]


def names(content: listing.Listing) -> list[str]:
    return [name for rows in content.splits.values() for name, _ in rows]


@pytest.fixture
def shard(tmp_path):
    """A shard of four samples, and the byte at which the header of each member begins."""
    path = write_tar(tmp_path / "in" / "train-0.tar", samples(4))
    with tarfile.open(path) as archive:
        return path, [member.offset for member in archive.getmembers()]


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_one_flipped_byte_in_any_header_is_an_error_with_its_offset(shard):
    path, offsets = shard
    whole = path.read_bytes()
    for offset in offsets:
        for place in (0, 124, 148, 156, 257):  # name, size, checksum, type, magic
            damaged = bytearray(whole)
            damaged[offset + place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"train-0.tar has a damaged header at byte {offset} "):
                tars.list_tars(path.parent)


def test_a_damaged_header_costs_its_sample_alone_where_it_may_be_skipped(shard):
    path, offsets = shard
    damaged = bytearray(path.read_bytes())
    damaged[offsets[2]] ^= 1  # 001.png
    path.write_bytes(damaged)
    content = tars.list_tars(path.parent, on_corrupt="skip")
    assert names(content) == [f"train-0.tar/{i:03d}.png" for i in (0, 2, 3)]
    ((reason, found),) = content.report.left_out.items()
    assert reason == "damaged or unlabelled in a shard"
    assert f"damaged header at byte {offsets[2]}" in found[0]


def test_a_damaged_shard_that_is_read_in_place_is_an_error_with_the_command_that_goes_on(shard):
    path, offsets = shard
    damaged = bytearray(path.read_bytes())
    damaged[offsets[2]] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"header at byte {offsets[2]} .* --input={path.parent} .*--on_corrupt=skip`"):
        open_source(SourceConfig("webdataset", str(path.parent)))


def test_a_zeroed_header_is_an_error(shard):
    path, offsets = shard
    whole = path.read_bytes()
    for offset in offsets[1:]:
        path.write_bytes(whole[:offset] + bytes(512) + whole[offset + 512 :])
        with pytest.raises(UserError, match=r"train-0.tar has a damaged header at byte \d+"):
            tars.list_tars(path.parent)


def test_a_shard_that_is_cut_anywhere_is_an_error(shard):
    path, offsets = shard
    whole = path.read_bytes()
    for end in [*offsets[1:], offsets[3] + 100, offsets[3] + 600, offsets[-1] + 1024]:
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"train-0.tar (ends at byte|is cut off|has a damaged header)"):
            tars.list_tars(path.parent)
    path.write_bytes(whole[: offsets[4]])
    with pytest.raises(UserError, match=rf"ends at byte {offsets[4]} without the end marker"):
        tars.list_tars(path.parent)
    content = tars.list_tars(path.parent, on_corrupt="skip")
    assert len(names(content)) == 2
    assert content.report.left_out


def test_concatenated_shards_are_read_to_the_end(shard, tmp_path):
    path, _ = shard
    second = write_tar(tmp_path / "other.tar", samples(3, start=4))
    path.write_bytes(path.read_bytes() + second.read_bytes())
    source = open_source(SourceConfig("webdataset", str(path.parent)))
    assert sorted(source[i]["image"] for i in range(7)) == sorted(encoded(i) for i in range(7))


def test_empty_and_foreign_files_are_refused(tmp_path):
    for content in (b"", b"no tar at all" * 100, b"\0" * 100):
        (tmp_path / "train-0.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"train-0.tar (ends at byte 0|has a damaged header at byte 0|hold)"):
            tars.list_tars(tmp_path)


def test_the_zeroed_header_of_an_empty_file_is_no_end_marker(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", [*sample("a"), ("empty.txt", b""), *sample("b", 1)])
    with tarfile.open(path) as archive:
        offset = archive.getmember("empty.txt").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes(512) + whole[offset + 512 :])
    with pytest.raises(UserError, match=rf"has a damaged header at byte {offset} \(it is zero\)"):
        tars.list_tars(tmp_path)
    assert len(names(tars.list_tars(tmp_path, on_corrupt="skip"))) == 2


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_members_of_a_sample_need_not_be_adjacent(tmp_path):
    members = samples(4)
    write_tar(tmp_path / "train-0.tar", members[::2] + members[:0:-2])
    content = tars.list_tars(tmp_path)
    assert content.splits["train"] == [(f"train-0.tar/{i:03d}.png", i % 2) for i in range(4)]


def test_the_key_ends_at_the_first_dot(tmp_path):
    members = [("7.jpg", PNG), ("7.depth.png", PNG), ("7.cls", b"1"), ("photo.v2.jpg", PNG), ("photo.v2.cls", b"0")]
    write_tar(tmp_path / "train-0.tar", [*members, ("a.b/8.png", PNG), ("a.b/8.cls", b"0")])
    content = tars.list_tars(tmp_path)
    assert content.splits["train"] == [("train-0.tar/7.jpg", 1), ("train-0.tar/a.b/8.png", 0)]
    ((reason, left_out),) = content.report.left_out.items()
    assert "the key ends at the first dot" in reason
    assert left_out == ["train-0.tar/7.depth.png", "train-0.tar/photo.v2.jpg"]


def test_long_and_foreign_names_and_folders(tmp_path):
    long = "folder/" * 30 + "x" * 120
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / str(form) / "train-0.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w", format=form) as archive:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for key in (long, "日本", "z"):
                for name, content in sample(key, 1, encoded(1)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        source = open_source(SourceConfig("webdataset", str(path.parent)))
        assert {source.id(i).removeprefix(str(path) + "/") for i in range(3)} == {f"{long}.png", "日本.png", "z.png"}
        assert all(source[i]["image"] == encoded(1) for i in range(3))


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("cls", b"", "holds no label: it must be one class number or name"),
        ("cls", b"  \n", "holds no label"),
        ("cls", b"\xff", "holds no label: 'utf-8' codec"),
        ("json", b'{"label": null}', "holds no label: the label null is neither a name nor a whole number"),
        ("json", b'{"label": [0, 2]}', r"label is \[0, 2\] and must be a name or a whole number"),
        ("json", b'{"label": {"a": 1}}', r"the label \{\"a\": 1\} is neither"),
        ("json", b'{"label": true}', "the label true is neither"),
        ("json", b'{"label": 1.5}', "the label 1.5 is neither"),
        ("json", b'{"labels": "cat"}', r'labels is "cat" and must be a list'),
        ("json", b'{"labels": [null]}', "the label null is neither"),
        ("json", b"[]", "it is not a JSON object"),
        ("json", b"null", "it is not a JSON object"),
        ("json", b"{", "holds no label"),
        ("txt", b"3", r"holds bad.png without a label; bad.cls or bad.json should hold it"),
    ],
)
def test_labels_that_are_none_are_refused_or_counted(tmp_path, field, text, message):
    write_tar(tmp_path / "train-0.tar", [*samples(2), ("bad.png", PNG), (f"bad.{field}", text)])
    with pytest.raises(UserError, match=message):
        tars.list_tars(tmp_path)
    content = tars.list_tars(tmp_path, on_corrupt="skip")
    assert (len(names(content)), content.class_names, content.num_classes) == (2, None, 2)
    assert any("bad" in name for name in content.report.left_out["damaged or unlabelled in a shard"])


def test_negative_labels_are_unlabelled_or_refused(tmp_path):
    write_tar(tmp_path / "train-0.tar", [*samples(2), *sample("x", -1)])
    content = tars.list_tars(tmp_path)
    assert content.num_classes == 2
    assert content.report.left_out == {"unlabelled (label -1)": ["train-0.tar/x.png"]}
    write_tar(tmp_path / "train-0.tar", [*samples(2), *sample("x", -7)])
    with pytest.raises(UserError, match="has the label -7"):
        tars.list_tars(tmp_path)


def test_two_labels_of_a_sample_must_agree(tmp_path):
    write_tar(tmp_path / "train-0.tar", [*sample("x", 1), ("x.json", b'{"label": 1}'), ("x.txt", b"hello")])
    assert tars.list_tars(tmp_path).splits["train"] == [("train-0.tar/x.png", 1)]
    write_tar(tmp_path / "train-0.tar", [*sample("x", 1), ("x.json", b'{"label": 2}')])
    with pytest.raises(UserError, match="has two different labels for x"):
        tars.list_tars(tmp_path)


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shards",
    [("train-000000-of-000002.tar", "train-000001-of-000002.tar"), ("train_0001.tar", "train_0002.tar"),
     ("train.00001.tar", "train.00002.tar"), ("train-1.tar", "train-22.tar"), ("train/a.tar", "train/b.tar")],
)  # fmt: skip
def test_shards_of_one_set_are_one_split(tmp_path, shards):
    for number, name in enumerate(shards):
        write_tar(tmp_path / name, samples(2, start=2 * number))
    config = SourceConfig("webdataset", str(tmp_path), "train")
    assert list_splits(config) == ["train"]
    assert len(open_source(config)) == 4


def test_compressed_shards_are_listed_and_not_read_in_place(tmp_path):
    write_tar(tmp_path / "train-0.tar.gz", samples(3), "w:gz")
    content = tars.list_tars(tmp_path)
    assert content.splits["train"] == [(f"train-0.tar.gz/{i:03d}.png", i % 2) for i in range(3)]
    with pytest.raises(UserError, match=r"train-0.tar.gz is compressed, so its images cannot be read at random"):
        open_source(SourceConfig("webdataset", str(tmp_path)))
    expanded = tars.list_tars(tmp_path, expanded=tmp_path / "expanded")
    assert [expanded.places[name].read() for name in names(expanded)] == [encoded(i) for i in range(3)]
    whole = (tmp_path / "train-0.tar.gz").read_bytes()
    for end in (20, len(whole) // 2, len(whole) - 4):
        (tmp_path / "train-0.tar.gz").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"train-0.tar.gz (cannot be decompressed|ends at|has a damaged)"):
            tars.list_tars(tmp_path)


def test_a_shard_that_inflates_beyond_reason_is_refused(tmp_path):
    (tmp_path / "train-0.tar.gz").write_bytes(6 * gzip.compress(bytes(32 << 20), 1))
    with pytest.raises(UserError, match="inflates to more than 100 times its size"):
        tars.list_tars(tmp_path, expanded=tmp_path / "expanded")


def test_zstandard_shards(tmp_path, monkeypatch):
    raw = write_tar(tmp_path / "raw.tar", samples(3)).read_bytes()
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train-0.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(10))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "zstandard", None)
        with pytest.raises(UserError, match=r"decompress it, or: pip install 'vit_scaling\[zstd\]'"):
            tars.list_tars(path.parent)
    zstandard = pytest.importorskip("zstandard")
    half = len(raw) // 2
    path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))  # frames may be several
    assert len(names(tars.list_tars(path.parent))) == 3
    path.write_bytes(zstandard.compress(raw)[:-20])
    with pytest.raises(UserError, match=r"train-0.tar.zst "):
        tars.list_tars(path.parent)
