"""The command line as a user meets it: every mistake is one sentence, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def train(*arguments: str, door: str = "train") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"vit_scaling.{door}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


SMOKE = "--config=configs/smoke.py:smoke"

MISTAKES = {
    "unknown field": (
        [SMOKE, "--config.optim.lrr=1"],
        "the config has no field 'lrr' there; the fields of OptimConfig",
    ),
    "a group of fields": (
        [SMOKE, "--config.duration=90epochs"],
        "--config.duration cannot be set as a whole: its fields are amount, unit, as in --config.duration.amount=...",
    ),
    "wrong type": ([SMOKE, "--config.optim.lr=fast"], "could not convert string to float: 'fast'"),
    "missing file": (["--config=configs/smok.py"], "there is no config file 'configs/smok.py'; beside it are"),
    "unknown variant": (["--config=configs/vit_imagenet.py:Q/16"], "no ViT size is called 'Q'"),
    "batch": ([SMOKE, "--config.data.batch_size=36"], "data.batch_size 36 cannot be divided over 8 devices"),
    "mesh": ([SMOKE, "--config.mesh.model=3"], "does not fit 8 devices"),
    "not a flag": ([SMOKE, "smoke"], "'smoke' is no flag"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake: str, tmp_path: Path) -> None:
    arguments, sentence = MISTAKES[mistake]
    done = train(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_and_help() -> None:
    done = train(SMOKE)
    assert (done.returncode, "--workdir must be given" in done.stderr) == (2, True)
    helped = train("--help")
    assert helped.returncode == 0
    assert "--config" in helped.stdout
    assert "--workdir" in helped.stdout
    assert "continues from the newest checkpoint" in helped.stdout


def test_a_whole_run_names_what_it_wrote(tmp_path: Path) -> None:
    done = train(SMOKE, f"--workdir={tmp_path / 'run'}", "--config.optim.lr=0.5", "--config.mesh.replica=2")
    assert done.returncode == 0, done.stderr
    for name in ("result.json", "metrics.jsonl", "figure.png", "checkpoints/4"):
        path = tmp_path / "run" / name
        assert path.exists()
        assert str(path) in done.stdout
    assert "accuracy: " in done.stdout
    assert "replica 2, data 4, model 1" in done.stdout
    assert '"lr": 0.5' in (tmp_path / "run" / "config.json").read_text()


def test_costs_are_a_table() -> None:
    """ResNet-50: 25,557,032 parameters and 8.2 GFLOP; S/16: table 2 of arXiv 2106.04560, 9.2 GFLOP."""
    names = ("configs/resnet_imagenet.py:50", "configs/vit_imagenet.py:S/16")
    done = train(*(f"--config={name}" for name in names), door="costs")
    assert done.returncode == 0, done.stderr
    header, resnet, vit = done.stdout.splitlines()
    assert header.split()[:3] == ["model", "image", "parameters"]
    assert resnet.split()[:5] == ["resnet_imagenet:50", "224x224", "25,557,032", "8.18", "24.54"]
    assert vit.split()[:5] == ["vit_imagenet:S/16", "224x224", "21,974,632", "9.15", "27.44"]
    assert float(vit.split()[5]) > 0
    wrong = train("--config=configs/study.py", door="costs")
    assert (wrong.returncode, "no model of its own" in wrong.stderr) == (2, True)


def test_costs_know_every_published_model() -> None:
    listed = train("--help", door="costs").stdout
    for file in (ROOT / "configs").glob("*_imagenet.py"):
        assert f"configs/{file.name}:" in listed
