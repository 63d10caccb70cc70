"""Tables of labels: every usual way of writing them is read, or refused with its line."""

import codecs
import json

import pytest

from tests.data.pictures import make
from vit_scaling import UserError
from vit_scaling.data.sources import listing, tables
from vit_scaling.data.sources.folders import list_folder

ROWS = "file,label\na/1.png,café\na/2.png,dog\n"


def read(root, text: str | bytes, name: str = "train.csv"):
    make(root, "a/1.png", "a/2.png")
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_folder(root)


@pytest.mark.parametrize(
    "text",
    [ROWS, "\ufeff" + ROWS,
     codecs.BOM_UTF16_LE + ROWS.encode("utf-16-le"), codecs.BOM_UTF16_BE + ROWS.encode("utf-16-be"),
     ROWS.replace(",", "\t"), ROWS.replace(",", ";"), ROWS.replace("\n", "\r\n"), ROWS + "\n\n",
     'File, Label ,note\n"a/1.png","café","x, ""y"""\na/2.png,dog,"two\nlines"\n', ROWS.replace("a/", "./a//"),
     ROWS.replace("file,", "filename,")],
    ids=["plain", "bom", "utf-16-le", "utf-16-be", "tabs", "semicolons", "crlf", "blank lines", "quotes", "paths",
         "filename"],
)  # fmt: skip
def test_tables_are_read_however_they_are_written(tmp_path, text):
    content = read(tmp_path, text)
    assert content.class_names == ("café", "dog")
    assert content.splits == {"train": [("a/1.png", 0), ("a/2.png", 1)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS.encode("latin-1"), r"line 2, byte 22 \(0xe9\), is not UTF-8 text; save the table as UTF-8"),
        (ROWS.encode("utf-16-le"), "is not UTF-8 text: byte 1 is zero"),
        (codecs.BOM_UTF16_LE + b"f\0i\0l", "is not UTF-16 text"),
        ("file,label\na/1.png," + "x" * 200_000 + "\n", "line 2 cannot be read: field larger than field limit"),
        ('file,label\na/1.png,"open\na/2.png,b\n', "line 3 cannot be read: unexpected end of data; is a quotation"),
        ("file,label\n" + "x" * (1 << 20), "line 2 is longer than 1,048,576 characters"),
        ("file,label\na/1.png,a,b\n", "line 2 has 3 fields, and the first line has 2"),
        ("file,label\na/1.png,\n", "line 2 lacks its label"),
        ("file,label\n,cat\n", "line 2 lacks its file"),
        ("file,label\n../../x.png,cat\n", r"line 2: \.\./\.\./x.png is outside of the set's folder"),
        ("file,label\na/../../x.png,cat\n", "is outside of the set's folder"),
        ("file,label\n/etc/x.png,cat\n", "line 2: /etc/x.png is outside of the set's folder"),
        ("file,label\na/9.png,cat\n", "lists a/9.png, which is not a file there"),
        ("file,label\na/1.png,cat\n./a/1.png,dog\n", "lists a/1.png twice in train"),
        ("name,label\na/1.png,cat\n", "needs the columns file and label .*; it has name, label"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_images_that_no_table_lists_are_counted(tmp_path):
    make(tmp_path, "a/3.png", "4.png", ".hidden/5.png")
    content = read(tmp_path, ROWS)
    assert content.report.left_out == {"images that no table lists": ["4.png", "a/3.png"]}


# ---- labels ----------------------------------------------------------------------------------------------------------


def number(*labels: str, multi_label: bool = False) -> listing.Listing:
    rows = [(f"{i}.png", label.split(";") if multi_label else [label]) for i, label in enumerate(labels)]
    return listing.number_labels({"train": rows}, multi_label, "the table", listing.Report())


@pytest.mark.parametrize(
    ("labels", "num_classes", "names", "numbers", "note"),
    [
        (["0", "2"], 3, None, [0, 2], "1 of 3 class numbers have no image (the first is 1)"),
        (["1", "2", "3"], 4, None, [1, 2, 3], "1 of 4 class numbers have no image (the first is 0)"),
        (["0", "1"], 2, None, [0, 1], None),
        (["07", "7", "+1"], 8, None, [7, 7, 1], "6 of 8 class numbers have no image (the first is 0)"),
        (["10", "b", "9"], 3, ("10", "9", "b"), [0, 2, 1], None),  # names: not all are numbers
        (["v1.5", "2.0"], 2, ("2.0", "v1.5"), [1, 0], None),
        (["999999", "0"], 1_000_000, None, [999_999, 0], "999,998 of 1,000,000 class numbers have no image"),
    ],
)
def test_labels_become_class_numbers_by_one_rule(labels, num_classes, names, numbers, note):
    content = number(*labels)
    assert (content.num_classes, content.class_names) == (num_classes, names)
    assert [label for _, label in content.splits["train"]] == numbers
    assert content.report.notes == [] if note is None else content.report.notes[0].startswith(note)


def test_unlabelled_images_are_left_out_and_counted():
    content = number("0", "-1", "1", "-1")
    assert content.splits["train"] == [("0.png", 0), ("2.png", 1)]
    assert content.report.left_out == {"unlabelled (label -1)": ["1.png", "3.png"]}
    assert content.num_classes == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "-2"], "has the label -2; class numbers must be at least 0 and below 1,000,000, or -1"),
        (["0", "1000000"], "has the label 1000000"),
        (["9" * 6000], "has the label 9999"),
        (["1.0", "0.0"], "has labels such as 0.0; class numbers must be whole numbers"),
        (["nan", "2"], "has labels such as nan"),
        (["-1", "-1"], "every label is -1"),
    ],
)
def test_labels_out_of_range_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        number(*labels)


def test_several_labels_of_an_image():
    content = number("0;3", "3;3", multi_label=True)
    assert content.splits["train"] == [("0.png", [0, 3]), ("1.png", [3])]
    with pytest.raises(UserError, match="has the label -1"):
        number("0;-1", multi_label=True)


def test_tables_of_several_splits_are_united_and_compared(tmp_path):
    make(tmp_path, "val.csv", content=b"file,label\na/2.png,dog\n")
    content = read(tmp_path, ROWS)
    assert content.splits["val"] == [("a/2.png", 1)]
    make(tmp_path, "val.csv", content=b"file,label\na/2.png,yak\n")
    with pytest.raises(UserError, match=r"split val of .* has the class yak, which train lacks"):
        list_folder(tmp_path)


# ---- Hugging Face's image folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_in_split_folders(tmp_path, form):
    make(tmp_path, "train/1.png", "train/x/2.png", "test/3.png")
    for split, rows in {"train": [("1.png", "cat"), ("x/2.png", "dog")], "test": [("3.png", "dog")]}.items():
        if form == "csv":
            text = "file_name,text,label\n" + "".join(f"{file},hello,{label}\n" for file, label in rows)
        else:
            text = "".join(json.dumps({"file_name": file, "label": label}) + "\n" for file, label in rows)
        (tmp_path / split / f"metadata.{form}").write_text(text)
    content = list_folder(tmp_path)
    assert content.class_names == ("cat", "dog")
    assert content.splits == {"test": [("test/3.png", 1)], "train": [("train/1.png", 0), ("train/x/2.png", 1)]}
    assert not content.report.left_out


def test_metadata_at_the_top_is_the_training_split_and_without_labels_the_folders_are_classes(tmp_path):
    make(tmp_path, "cat/1.png", "dog/2.png")
    make(
        tmp_path,
        "metadata.jsonl",
        content=b'{"file_name": "cat/1.png", "label": 5}\n\n{"file_name": "dog/2.png", "label": 0}',
    )
    assert list_folder(tmp_path).splits == {"train": [("cat/1.png", 5), ("dog/2.png", 0)]}
    make(tmp_path, "metadata.jsonl", content=b'{"file_name": "cat/1.png", "text": "a cat"}\n')
    assert list_folder(tmp_path).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"file_name": "1.png", "label": null}', "line 1 lacks its label"),
        ('{"file_name": "1.png", "label": [1]}', r"line 1: label is \[1\] and must be a name or a whole number"),
        ('{"file_name": "1.png", "label": {}}', r"label \{\} is neither a name nor a whole number"),
        ('{"file_name": "1.png", "label": true}', "label true is neither"),
        ('{"file_name": "1.png", "labels": ["a", 2.5]}', "label 2.5 is neither"),
        ('{"file_name": 7, "label": 1}', "the file is 7 and must be a file name"),
        ('{"file_name": "../1.png", "label": 1}', "is outside of the set's folder"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_json_lines_that_cannot_be_used_are_refused_with_their_line(tmp_path, line, message):
    make(tmp_path, "1.png")
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        list_folder(tmp_path)


def test_a_table_is_not_held_in_memory_as_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file,label\n" + "a,b\n" * 10)
    lines = tables.read_lines(str(path))
    assert next(lines) == "file,label\n"  # a generator: the file is read as it is needed
    assert sum(1 for _ in lines) == 10
