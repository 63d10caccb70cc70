"""The command line: exit codes, one sentence for each mistake, help, and configs by path or name."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from tests import commands
from vit_scaling import TransientError, UserError, cli
from vit_scaling.training import fields

ROOT = Path(__file__).parent.parent
SMOKE = "--config=configs/smoke.py:smoke"


def run(command: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"vit_scaling.{command}", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


# ---- mistakes on the command line ------------------------------------------------------------------------------------

MISTAKES = {
    "unknown field": ([SMOKE, "--config.optim.lrr=1"], "has no field 'lrr' there; the fields of OptimConfig are name"),
    "a group of fields": (
        [SMOKE, "--config.duration=90epochs"],
        "--config.duration cannot be set as a whole: its fields are amount, unit, as in --config.duration.amount=...",
    ),
    "not a number": ([SMOKE, "--config.optim.lr=fast"], "--config.optim.lr=fast: could not convert string to float"),
    "no number": ([SMOKE, "--config.optim.lr="], "--config.optim.lr="),
    "neither true nor false": ([SMOKE, "--config.model.scan=maybe"], "--config.model.scan is 'maybe'; it must be"),
    "not an integer": ([SMOKE, "--config.mesh.data=1.5"], "--config.mesh.data=1.5: invalid literal for int()"),
    "an open bracket": ([SMOKE, "--config.model.patch=(7,7"], "--config.model.patch=(7,7"),
    "a word for a tuple": (
        [SMOKE, "--config.model.patch=seven"],
        "config.model.patch is ('seven',); it must be tuple[int, int]",
    ),
    "an empty field": ([SMOKE, "--config..lr=1"], "an override names no field that can be set"),
    "beyond a field": ([SMOKE, "--config.seed.x=1"], "an override names no field that can be set"),
    "a model as a whole": ([SMOKE, "--config.model=5"], "an override names no field that can be set"),
    "too long a tuple": ([SMOKE, "--config.model.patch=(7,7,7)"], "config.model.patch is (7, 7, 7); it must be"),
    "missing file": (["--config=configs/smok.py"], "there is no config 'configs/smok.py'; there are configs/"),
    "missing name": (["--config=smok"], "there is no config 'smok'; there are aa_resnet_imagenet, "),
    "empty": (["--config="], "there is no config ''"),
    "not Python": (["--config=/etc/passwd"], "the config file /etc/passwd:1 failed: SyntaxError"),
    "not text": ([f"--config={sys.executable}"], f"the config file {sys.executable}:1 failed: "),
    "no get_config": (["--config=tests/tiny.py"], "has no function get_config(arg)"),
    "unknown variant": (["--config=configs/vit_imagenet.py:Q/16"], "no ViT size is called 'Q'"),
    "twice": ([SMOKE, "--config=vit_imagenet"], "--config is given twice"),
    "not a flag": ([SMOKE, "smoke"], "'smoke' is not a flag; flags look like --name=value"),
    "unknown flag": ([SMOKE, "--wokrdir=x"], "Unknown command line flag 'wokrdir'"),
    "no config": (["--workdir=x"], "--config must be given; --help says what it is"),
    "override first": (["--config.seed=1", SMOKE], "before a value for --config was specified"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_sentence(mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    with pytest.raises(UserError) as raised:
        commands.parse("train", *arguments)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shwo", "x"], "'shwo' is not a command; choose one of import, export, push, show"),
        (["--input=x"], "name a command, one of import, export, push, show"),
        (["show", "--input=x", "y"], "'y' is not a flag"),
        (["show"], "--input must be given"),
    ],
)
def test_a_missing_word_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        commands.parse("weights", *arguments)


def test_a_mistake_exits_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    for arguments, sentence in (
        ([SMOKE, "--config.data.batch_size=36"], "data.batch_size 36 cannot be divided over 8 devices"),
        ([SMOKE, "--config.mesh.model=3"], "does not fit 8 devices"),
    ):
        done = run("train", *arguments, f"--workdir={tmp_path / 'run'}")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert sentence in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_study_is_not_a_run() -> None:
    with pytest.raises(UserError, match="--config is a study of many runs; run it with the command study"):
        cli.need_config(commands.parse("train", "--config=configs/study.py"))


# ---- exit codes ------------------------------------------------------------------------------------------------------


def user_error() -> None:
    raise UserError("optim.lr is 0")


def numpy_error() -> None:
    import numpy as np

    np.zeros(3).reshape(2, 2)  # a bug of ours: NumPy raises ValueError


def transient() -> None:
    raise TransientError("worker 3 died")


def disk_full() -> None:
    try:
        raise OSError(28, "No space left on device", "/scratch/run")
    except OSError as error:
        raise RuntimeError("handle is closed") from error


def interrupted() -> None:
    raise KeyboardInterrupt


MEND = "free space or repair the disk, and start again"


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        (user_error, 2, "error: optim.lr is 0\n"),
        (transient, 1, "error: worker 3 died\n"),
        (disk_full, 1, f"error: a file cannot be read or written (No space left on device: /scratch/run); {MEND}\n"),
        (interrupted, 130, "stopped\n"),
        (numpy_error, 1, None),
    ],
)
def test_exit_codes(fault, code: int, sentence: str | None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(cli, "parse", lambda *arguments: [])
    with pytest.raises(SystemExit) as left:
        cli.run(lambda argv: fault(), "A command.")
    error = capsys.readouterr().err
    assert left.value.code == code
    if sentence is not None:
        assert error == sentence
    else:
        assert error.startswith("Traceback")
        assert "in numpy_error" in error
        assert error.rstrip().endswith("cannot reshape array of size 3 into shape (2,2)")


def test_a_bug_in_the_package_that_a_config_meets_keeps_its_traceback(tmp_path: Path) -> None:
    """An error raised in the config file itself is the user's, with its line; one raised below it is not."""
    own, below = tmp_path / "own.py", tmp_path / "below.py"
    own.write_text("def get_config(arg=None):\n    return {}['lr']\n")
    below.write_text("import json\ndef get_config(arg=None):\n    return json.loads('{')\n")
    with pytest.raises(UserError, match=r"own.py:2 failed: KeyError: 'lr'"):
        cli.load_config(str(own))
    with pytest.raises(json.JSONDecodeError):
        cli.load_config(str(below))
    own.write_text("def get_config(arg=None):\n    return 5\n")
    with pytest.raises(UserError, match="returned int and not a config"):
        cli.load_config(str(own))


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_ctrl_c_while_modules_are_imported_ends_with_one_line(number: int, tmp_path: Path) -> None:
    """A library that swallows KeyboardInterrupt while it is imported; then the run would go on to its end."""
    (tmp_path / "jax.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "vit_scaling.train", SMOKE, "--workdir=x"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "stopped\n")


# ---- commands --------------------------------------------------------------------------------------------------------

HERE = [name for name in cli.COMMANDS if (ROOT / "vit_scaling" / f"{name}.py").exists()]


@pytest.mark.parametrize(("program", "rarely"), [("vit-scaling", True), ("notebook", False)])
def test_a_command_collects_garbage_rarely_and_a_program_that_imports_it_as_before(program: str, rarely: bool) -> None:
    code = f"import gc, sys; sys.argv[0] = {program!r}; import vit_scaling.cli; print(gc.get_threshold()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (int(done.stdout) > 10_000) == rarely, done.stderr


def test_every_command_is_known() -> None:
    top = {path.stem for path in (ROOT / "vit_scaling").glob("*.py")}
    assert top - {"__init__", "cli", "config", "names", "paths"} <= set(cli.COMMANDS)
    assert len(HERE) >= 7


@pytest.mark.parametrize("command", HERE)
def test_help_of_every_command_fits_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with commands.loaded(command, "--help") as module:
        monkeypatch.setitem(sys.modules, "__main__", module)
        text = cli._help(module.__doc__)
    assert f"./run.sh {command} " in text
    assert [line for line in text.splitlines() if len(line) > 80] == []
    if command in ("train", "plan", "study"):
        assert "lr: float = " in text
        assert "  every: Duration = 50 steps" in text
        assert "seconds without a step" in text  # a comment of LogConfig


def test_help_has_every_field_of_the_config() -> None:
    from vit_scaling import config

    lines = "\n".join(fields.describe())
    for kind in (config.Config, config.LogConfig, config.MeshConfig, config.OptimConfig, config.TransformConfig):
        for name in kind.__dataclass_fields__:
            assert f"  {name}: " in lines or f"({type(name).__name__}" in lines or f"{name} (" in lines, name


def test_vit_scaling_runs_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ran = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda name, **how: ran.append((name, sys.argv, how)))
    monkeypatch.setattr(sys, "argv", ["vit-scaling", "costs", "--config=smoke"])
    cli.main()
    assert ran == [
        ("vit_scaling.costs", ["vit-scaling", "--config=smoke"], {"run_name": "__main__", "alter_sys": True})
    ]
    for arguments, code in ((["--help"], 0), (["cost"], 2), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["vit-scaling", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == code
    assert "commands: train, evaluate, " in capsys.readouterr().out


def test_a_whole_run_names_what_it_wrote(tmp_path: Path) -> None:
    done = run("train", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.optim.lr=0.5", "--config.mesh.replica=2")
    assert done.returncode == 0, done.stderr
    for name in ("result.json", "metrics.jsonl", "figure.png", "checkpoints/4"):
        path = tmp_path / "run" / name
        assert path.exists()
        assert str(path) in done.stdout
    assert "accuracy: " in done.stdout
    assert "replica 2, data 4, model 1" in done.stdout
    assert '"lr": 0.5' in (tmp_path / "run" / "config.json").read_text()


def test_print_config_shows_the_resolved_config(capsys: pytest.CaptureFixture) -> None:
    with commands.loaded("train", SMOKE, "--print_config", "--config.optim.lr=0.5") as train:
        train.main(cli.parse(sys.argv))
    shown = json.loads(capsys.readouterr().out)
    assert (shown["optim"]["lr"], shown["duration"]) == (0.5, {"amount": 4, "unit": "steps"})
    with commands.loaded("train", "--config=vit_imagenet", "--print_config") as train:
        train.main(cli.parse(sys.argv))
    # 90 epochs of 99% of ImageNet's 1,281,167 images in batches of 1,024, whether or not they are here
    assert json.loads(capsys.readouterr().out)["duration"] == {"amount": 111_477, "unit": "steps"}


def costs(*arguments: str) -> list[list[str]]:
    with commands.loaded("costs", *arguments) as module:
        cli.parse(sys.argv)
        return [list(module.line(name, flags.FLAGS["num_classes"].value)) for name in flags.FLAGS["config"].value]


def test_costs_count_the_classes_of_each_config() -> None:
    """ResNet-50: 25,557,032 parameters and 8.2 GFLOPs; S/16: Table 2 of arXiv 2106.04560, 9.2 GFLOPs.

    The smoke model has 64 x 10 + 10 parameters in its classifier for the ten digits; with 1,000 classes 64,350 more.
    """
    resnet, vit, smoke, jft = costs(
        "--config=configs/resnet_imagenet.py:50",
        "--config=vit_imagenet:S/16",
        "--config=smoke",
        "--config=vit_jft:G/14",
    )
    assert resnet[:6] == ["resnet_imagenet:50", "224x224", "1,000", "25,557,032", "8.18", "24.54"]
    assert vit[:6] == ["vit_imagenet:S/16", "224x224", "1,000", "21,974,632", "9.15", "27.44"]
    assert float(vit[6]) > 0
    assert smoke[:4] == ["smoke", "28x28", "10", "261,130"]
    assert jft[2:4] == ["29,593", "1,930,404,761"]
    assert costs("--config=smoke", "--num_classes=1000")[0][3] == "325,480"
    with pytest.raises(UserError, match="no model of its own"):
        costs("--config=configs/study.py")


def test_costs_ask_for_classes_that_are_unknown(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "vit_jft.py").read_text().replace('name="jft"', 'name="/nowhere/set"')
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=r"classes of .* are unknown.*give --num_classes"):
        costs(f"--config={tmp_path / 'own.py'}")


def test_costs_know_every_published_model() -> None:
    with commands.loaded("costs") as module:
        assert {path.stem for path in (ROOT / "configs").glob("*_imagenet.py")} <= module.PUBLISHED.keys()


def test_classes_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    with commands.loaded("weights", "show", "--input=x") as weights:
        for content, sentence in (
            (b"1\ntwo\n", "line 2 is 'two'"),
            (b"", "is empty"),
            (b"\xff\xfe1", "cannot be read: 'utf-8' codec"),
            ("²".encode(), "line 1 is '²'"),
        ):
            path.write_bytes(content)
            with pytest.raises(UserError, match=sentence):
                weights._class_map(str(path))
        with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
            weights._class_map(str(tmp_path / "none"))


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_configs_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = cli.load_config("configs/swin_digits.py:v2")
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("swin_digits:v2") == cli.load_config("configs/swin_digits.py:v2") == by_path
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "smoke.py", tmp_path / "configs" / "swin_digits.py")
    assert cli.load_config("configs/swin_digits.py") != by_path  # the file that is there comes first
    assert importlib.util.find_spec("configs") is not None


# ---- exit codes of a study -------------------------------------------------------------------------------------------


def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome, *arguments: str) -> int | str | None:
    """Runs the smoke study with `runner.run_all` replaced by `outcome`, and returns its exit code."""
    from vit_scaling.studies import runner

    monkeypatch.setattr(runner, "run_all", outcome)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with commands.loaded("study", "--config=study:smoke", f"--workdir={tmp_path}", *arguments) as module:
        try:
            module.main(cli.parse(sys.argv))
        except SystemExit as left:
            return left.code
    return 0


def test_a_study_with_failed_runs_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert study(tmp_path, monkeypatch, lambda *args, **how: {}) == 0
    assert study(tmp_path, monkeypatch, lambda *args, **how: {"1-1": "exit code 1"}) == 1
    assert "1 of 7 runs failed" in capsys.readouterr().out


def test_an_interrupted_study_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*args, **how):
        raise KeyboardInterrupt

    assert study(tmp_path, monkeypatch, interrupted) == 130
    assert capsys.readouterr().err == "stopped; the same command continues from there\n"


def test_an_interrupted_run_of_a_study_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_scaling.studies import scaling
    from vit_scaling.training import loop

    name = scaling.plan(cli.load_config("study:smoke"), tmp_path)[0].name
    for result, code in (({"interrupted": 3}, 1), ({"accuracy": 1.0}, 0)):
        monkeypatch.setattr(loop, "train", lambda config, workdir, result=result: result)
        assert study(tmp_path, monkeypatch, None, f"--only={name}") == code
    with pytest.raises(UserError, match="--only=none is not a run of the study; the first is"):
        study(tmp_path, monkeypatch, None, "--only=none")
