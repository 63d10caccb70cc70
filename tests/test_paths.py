"""Paths that a user gives are expanded or refused, everywhere in the same way."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from vit_scaling import UserError, cli, interop, paths
from vit_scaling.data import sources
from vit_scaling.data.sources import SourceConfig
from vit_scaling.training import initial

ROOT = Path(__file__).parent.parent
# Flags of the commands that name files.
PATHS = {"workdir", "output", "weights", "sheet", "features", "data_dir", "fed", "compare", "classes", "points"}


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("RUNS", "/scratch/runs")
    assert paths.expand("~/runs/a") == "/home/ada/runs/a"
    assert paths.expand("$RUNS/a") == paths.expand("${RUNS}/a") == "/scratch/runs/a"
    assert paths.expand("runs/a:b~c") == "runs/a:b~c"
    assert paths.local(Path("~/a")) == Path("/home/ada/a")
    monkeypatch.setenv("RUNS", "gs://bucket/runs")
    assert paths.expand("$RUNS/a", bucket=True) == "gs://bucket/runs/a"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the path is empty"),
        ("$NO_SUCH_VARIABLE/a", "variable 'NO_SUCH_VARIABLE', which is not set"),
        ("${NO SUCH}/a", "variable 'NO SUCH', which is not set"),
        ("~no_such_user/a", "'~no_such_user/a' names the home of a user who is not known"),
        ("s3://bucket/a", "'s3://bucket/a' is of a kind (s3:) that is not supported"),
        ("file:///tmp/a", "(file:) that is not supported"),
        ("gs:/bucket/a", "write gs://BUCKET/PATH, with two slashes"),
        ("gs://", "names no bucket"),
        ("gs:///a", "names no bucket"),
    ],
)
def test_a_path_that_does_not_work_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"[a-z]") as caught:
        paths.expand(text, bucket=True)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bucket_is_refused_where_it_does_not_work() -> None:
    with pytest.raises(UserError, match=r"gcloud storage cp -r`, or mount the bucket with gcsfuse"):
        paths.local("gs://bucket/a")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the extra gcs: pip install 'vit_scaling\[gcs\]'"):
        paths.place("gs://bucket/a")


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet", "idx"])
def test_other_sets_than_prepared_ones_refuse_a_bucket(kind: str) -> None:
    with pytest.raises(UserError, match="'gs://bucket/set' is in a bucket"):
        sources.open_source(SourceConfig(kind, "gs://bucket/set"))


def test_sets_and_weights_are_named_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    (tmp_path / "set").mkdir()
    assert sources.parse("$DATA/set").name == str(tmp_path / "set")
    with pytest.raises(UserError, match=f"no weight file or folder '{tmp_path}/none.npz'"):
        interop.read("$DATA/none.npz")
    with pytest.raises(UserError, match="s3:"):
        initial.read("s3://bucket/a.npz")


def test_a_new_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "shard"

    def fail() -> None:
        with paths.new_file(path) as file:
            file.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    with paths.new_file(path) as file:
        file.write_text("whole")
        assert not path.exists()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("shard", "whole")]


def test_a_flag_names_itself() -> None:
    values = flags.FlagValues()
    flags.DEFINE(cli.PathParser(), "output", None, "Where to.", flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError, match=r"--output=gs://bucket/x: the path 'gs://bucket/x' is in a"):
        values(["program", "--output=gs://bucket/x"])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_that_names_a_file_is_read_as_a_path(command: str) -> None:
    for node in ast.walk(ast.parse((ROOT / "vit_scaling" / f"{command}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            first = node.args[0]
            name = first.value if isinstance(first, ast.Constant) else None
            assert name not in PATHS, f"--{name} of {command} takes a cli.PathParser"


def test_a_refused_path_leaves_no_folder(tmp_path: Path) -> None:
    words = ["--weights=w.npz", "--output=gs://bucket/x.csv", "image.jpg"]
    command = [sys.executable, "-m", "vit_scaling.predict", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: flag --output=gs://bucket/x.csv: the path")
    assert not list(tmp_path.iterdir())
