"""Folders of images: what is read, what is left out and named, and how classes are numbered."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.pictures import JPEG, PNG, encoded, make
from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, folders, listing, open_source
from vit_scaling.data.sources.folders import list_folder


def labels(content: listing.Listing, split: str = "all") -> dict[str, str]:
    """{file: class name} of a split."""
    return {file: content.class_names[label] for file, label in content.splits[split]}


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_images_at_any_depth_belong_to_the_class_folder(tmp_path):
    make(tmp_path, *(f"cat/{i}.jpg" for i in range(4)), *(f"dog/{i}.jpg" for i in range(4)))
    make(tmp_path, "cat/outdoor/9.jpg", "dog/a/b/c/10.jpg")
    content = list_folder(tmp_path)
    assert (content.class_names, list(content.splits)) == (("cat", "dog"), ["all"])
    assert len(content.splits["all"]) == 10
    assert labels(content)["cat/outdoor/9.jpg"] == "cat"
    assert labels(content)["dog/a/b/c/10.jpg"] == "dog"


HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@pytest.mark.parametrize("where", ["", "cat/", "train/", "train/cat/"])
def test_hidden_and_system_entries_are_never_classes_or_images(tmp_path, where):
    split = "train/" if where.startswith("train") else ""
    make(tmp_path, f"{split}cat/1.png", f"{split}dog/2.png")
    make(tmp_path, *(f"{where}{name}/x/3.png" for name in HIDDEN), f"{where}._1.png", f"{where}Thumbs.db")
    make(tmp_path, f"{where}desktop.ini", f"{where}.DS_Store")
    content = list_folder(tmp_path)
    assert content.class_names == ("cat", "dog")
    assert sum(map(len, content.splits.values())) == 2
    assert len(content.report.ignored) == len(HIDDEN) + 4
    assert not content.report.left_out
    assert any("ignored 11 (" in line and "hidden or system" in line for line in content.report.lines())


@pytest.mark.parametrize(
    "names",
    [("train", "val"), ("train", "validation", "test"), ("training", "testing"), ("TRAIN", "Valid"), ("train",),
     ("ILSVRC2012_img_train", "ILSVRC2012_img_val")],
)  # fmt: skip
def test_splits_where_every_folder_has_a_splits_name(tmp_path, names):
    for name in names:
        make(tmp_path, f"{name}/cat/1.png", f"{name}/dog/deep/2.png")
    make(tmp_path, "annotations/boxes.xml", "readme.txt", content=b"text")
    content = list_folder(tmp_path)
    assert sorted(content.splits) == sorted(names)
    assert content.class_names == ("cat", "dog")
    assert all(len(rows) == 2 for rows in content.splits.values())


def test_other_folders_make_all_of_them_classes_and_say_so(tmp_path):
    make(tmp_path, "train/a/1.png", "test/b/2.png", "bus/3.png")
    content = list_folder(tmp_path)
    assert content.class_names == ("bus", "test", "train")
    assert "test and train look like splits, but bus does not" in content.report.notes[0]
    make(tmp_path / "two", "train/1.png", "bus/2.png")  # a railway train
    assert list_folder(tmp_path / "two").class_names == ("bus", "train")
    assert not list_folder(tmp_path / "two").report.notes


def test_one_folder_around_everything_is_noted(tmp_path):
    make(tmp_path, "PetImages/cat/1.png", "PetImages/dog/2.png")
    content = list_folder(tmp_path)
    assert content.class_names == ("PetImages",)
    assert f"name {tmp_path}/PetImages instead" in content.report.notes[0]


def test_tiny_imagenet(tmp_path):
    for name in ("n01", "n02"):
        make(tmp_path, f"train/{name}/images/{name}_0.JPEG", f"train/{name}/images/{name}_1.JPEG")
        make(tmp_path, f"train/{name}/{name}_boxes.txt", content=b"n01_0.JPEG\t0\t0\t1\t1\n")
    make(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG", "test/images/test_0.JPEG")
    table = b"val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\r\n"
    make(tmp_path, "val/val_annotations.txt", content=table)
    make(tmp_path, "wnids.txt", "words.txt", content=b"n01\n")
    content = list_folder(tmp_path)
    assert content.class_names == ("n01", "n02")
    assert {split: len(rows) for split, rows in content.splits.items()} == {"train": 4, "val": 2}
    assert labels(content, "val") == {"val/images/val_0.JPEG": "n02", "val/images/val_1.JPEG": "n01"}
    assert content.report.left_out == {
        "unlabelled: in a split, and in no class folder": ["test/images/test_0.JPEG"],
        "images that no table lists": ["val/images/val_2.JPEG"],
    }
    assert list_folder(tmp_path / "train").class_names == ("n01", "n02")
    make(tmp_path, "val/val_annotations.txt", content=b"val_9.JPEG\tn02\n")
    with pytest.raises(UserError, match=r"val_annotations.txt line 1 lists val_9.JPEG, which is not in"):
        list_folder(tmp_path)


def test_images_without_a_class_folder_are_counted_or_refused(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png", "3.png", "4.png")
    assert list_folder(tmp_path).report.left_out == {"images outside of class folders": ["3.png", "4.png"]}
    make(tmp_path / "flat", "train/1.png", "train/2.png", "val/cat/3.png")
    with pytest.raises(UserError, match=r"flat/train holds images and no class folders"):
        list_folder(tmp_path / "flat")


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_a_split_without_a_class_keeps_the_training_numbers(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/emu/3.png", "val/cat/4.png", "val/emu/5.png")
    content = list_folder(tmp_path)
    assert content.splits["val"] == [("val/cat/4.png", 0), ("val/emu/5.png", 2)]
    assert "split val lacks 1 (dog) of the classes" in content.report.notes[0]


def test_a_split_with_an_unknown_class_is_refused_by_name(tmp_path):
    make(tmp_path, "train/cat/1.png", "val/cat/4.png", "val/yak/5.png")
    with pytest.raises(UserError, match=r"split val of .* has the class yak, which train lacks"):
        list_folder(tmp_path)


def test_class_order_is_fixed():
    for names in (["1", "01", "2"], ["2", "01", "1"], ["01", "2", "1"]):
        assert listing.class_order(names) == ("01", "1", "2")
    assert listing.class_order(["10", "9", "0", "00"]) == ("0", "00", "9", "10")
    assert listing.class_order(["é", "z", "Z", "a"]) == ("Z", "a", "z", "é")  # code points, whatever the locale
    assert listing.class_order(["9" * 5000, "1"]) == ("1", "9" * 5000)


def test_class_order_does_not_depend_on_the_hash_seed(tmp_path):
    make(tmp_path, "1/a.png", "01/a.png", "2/a.png", "001/a.png")
    code = f"from vit_scaling.data.sources import folders as f; print(f.list_folder({str(tmp_path)!r}).class_names)"
    seen = {
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": "C"},
                       capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert seen == {"('001', '01', '1', '2')\n"}


def test_both_unicode_forms_of_a_name_are_one_class(tmp_path):
    make(tmp_path, "train/caf\u00e9/1.png", "train/b/2.png", "val/cafe\u0301/3.png")
    content = list_folder(tmp_path)
    assert content.class_names == ("b", "caf\u00e9")
    assert content.splits["val"][0][1] == 1


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_content_decides_what_is_an_image(tmp_path):
    make(tmp_path, "cat/1.jfif", "cat/2.JPE", "cat/3", "cat/4.dat", content=JPEG)
    make(tmp_path, "dog/5.gif", content=b"GIF89a" + bytes(40))
    make(tmp_path, "emu/6.heic", content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    make(tmp_path, "fox/7.tif", content=b"not a picture")
    make(tmp_path, "cat/notes.txt", "cat/meta.json", "cat/paper.pdf", content=b"{}")
    make(tmp_path, "cat/more.zip", content=b"PK")
    content = list_folder(tmp_path)
    assert content.class_names == ("cat", "dog", "emu", "fox")  # none vanishes, none is renumbered
    assert sorted(labels(content)) == ["cat/1.jfif", "cat/2.JPE", "cat/3", "cat/4.dat", "dog/5.gif"]
    assert content.report.left_out == {
        "HEIC files, which cannot be decoded here": ["emu/6.heic"],
        "not an image by its content": ["fox/7.tif"],
        "archives and arrays, which are not read from image folders": ["cat/more.zip"],
    }


def test_a_folder_without_images_is_no_class_and_is_named(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png")
    make(tmp_path, "docs/readme.txt", content=b"x")
    content = list_folder(tmp_path)
    assert (content.class_names, content.report.ignored) == (("cat", "dog"), ["docs"])


def test_names_of_any_encoding(tmp_path):
    names = [b"caf\xe9", b"two words", b"line\nbreak", b"\x1b[31mred", "日本".encode()]
    for name in names:
        os.makedirs(os.path.join(os.fsencode(tmp_path), name))
        with open(os.path.join(os.fsencode(tmp_path), name, b"\xff 1.png"), "wb") as stream:
            stream.write(PNG)
    source = open_source(SourceConfig("folder", str(tmp_path), "all"))
    assert [os.fsencode(name) for name in source.class_names] == sorted(names, key=os.fsdecode)
    assert all(source[i]["image"] == PNG for i in range(len(names)))
    shown = [source.id(i) for i in range(len(names))]
    assert all(name.isprintable() for name in shown)
    assert any(r"\x1b[31mred/\udcff 1.png" in name for name in shown)


def test_devices_and_pipes_are_refused_by_name(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cat/zero.png is a device, a pipe or a socket"):
        list_folder(tmp_path)
    (tmp_path / "cat" / "zero.png").unlink()
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    with pytest.raises(UserError, match=r"cat/pipe.png is a device, a pipe or a socket"):
        list_folder(tmp_path)
    (tmp_path / "cat" / "pipe.png").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "dog" / "s.png"))
        with pytest.raises(UserError, match=r"dog/s.png is a device, a pipe or a socket"):
            list_folder(tmp_path)


def test_a_file_that_becomes_a_pipe_or_grows_is_not_read(tmp_path, monkeypatch):
    from vit_scaling.data.images.codec import CorruptImageError

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptImageError, match="not a regular file"):
        listing.Place(str(tmp_path / "pipe")).read()
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(listing.MAX_BYTES + 1)
    with pytest.raises(CorruptImageError, match="more than max_bytes"):
        listing.Place(str(tmp_path / "large")).read()
    with pytest.raises(OSError, match="ended 10 bytes early"):
        listing.Place(str(tmp_path / "large"), listing.MAX_BYTES - 9, 20).read()


def test_links(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png")
    make(tmp_path.parent / f"{tmp_path.name}-elsewhere", "3.png", "deep/4.png")
    (tmp_path / "emu").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (tmp_path / "cat" / "5.png").symlink_to(tmp_path / "dog" / "2.png")
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "emu" / "deep")
    assert len(list_folder(tmp_path).splits["all"]) == 6
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"cat/up is a link to a folder that holds it"):
        list_folder(tmp_path)
    (tmp_path / "cat" / "up").unlink()
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cat/gone.png is a link to a file that does not exist"):
        list_folder(tmp_path)


@pytest.mark.parametrize("unreadable", ["cat", "cat/deep", ""])
def test_an_unreadable_folder_is_an_error_that_names_it(tmp_path, monkeypatch, unreadable):
    make(tmp_path, "cat/deep/1.png", "dog/2.png")
    real = os.scandir

    def scandir(path):
        if os.path.normpath(path) == os.path.normpath(tmp_path / unreadable):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"{unreadable}/? cannot be read: Permission denied"):
        list_folder(tmp_path)


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path, monkeypatch):
    make(tmp_path, "cat/1", "dog/2.png")

    def fail(path, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "open", fail, raising=False)
    with pytest.raises(UserError, match=r"cat/1 cannot be read: Permission denied"):
        list_folder(tmp_path)


def test_what_is_left_out_is_logged_once(tmp_path, caplog):
    make(tmp_path, "cat/1.png", "dog/2.png", "3.png")
    for _ in range(2):
        open_source(SourceConfig("folder", str(tmp_path), "all"))
    assert caplog.text.count("left out 1 (3.png): images outside of class folders") == 1


def test_an_empty_folder_says_what_was_expected_and_left_out(tmp_path):
    make(tmp_path, "3.png", content=encoded(3))
    with pytest.raises(UserError, match=r"holds no class folders .*; left out 1 \(3.png\)"):
        list_folder(tmp_path)
