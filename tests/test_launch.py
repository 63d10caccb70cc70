"""The launchers: what they would do, word for word, and that they go on until there is a result."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).parent / "files" / "launch"

TRAIN = ["--", "--config=configs/vit_imagenet.py:S/16", "--config.optim.decay_rules=(('.*', 'body'),)"]
POD = [
    *("--name=my-slice", "--project=my-project", "--zone=my-zone", "--accelerator=v5litepod-16"),
    *("--version=v2-alpha-tpuv5-lite", "--workdir=/mnt/runs/s16", "--spot", "--setup=sudo ./mount.sh /mnt/runs"),
]
SLURM = [
    *("--nodes=4", "--time=12:00:00", "--gpus-per-node=8", "--cpus-per-task=96", "--partition=big", "--account=me"),
    *("--name=s16", "--setup=module load cuda", "--workdir=/scratch/s16"),
]
K8S = [
    *("--name=s16", "--image=registry/vit:1", "--hosts=4", "--chips=google.com/tpu=4", "--namespace=vision"),
    "--select=cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice",
    *("--select=cloud.google.com/gke-tpu-topology=4x4", "--claim=runs", "--workdir=/run/vit_scaling/s16"),
]
ARGUMENTS = {"pod": POD, "slurm": SLURM, "k8s": K8S}
FILES = {"pod": "pod.sh", "slurm": "slurm.sh", "k8s": "k8s.yaml"}


def launch(command: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        ["./run.sh", command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )


def dry_run(command: str) -> str:
    shown = launch(command, *ARGUMENTS[command], "--dry-run", *TRAIN)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.replace(str(ROOT), "/home/me/vit_scaling")


def shellcheck(path: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    command = [str(checker) if checker.exists() else "shellcheck", "--external-sources", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("command", ARGUMENTS)
def test_a_dry_run_is_word_for_word_what_would_be_done(command: str) -> None:
    assert dry_run(command) == (EXPECTED / FILES[command]).read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").iterdir()))
def test_launchers_pass_shellcheck(script: str) -> None:
    shellcheck(ROOT / "launch" / script)


@pytest.mark.parametrize("command", ["pod", "slurm", "k8s"])
def test_what_launchers_write_passes_shellcheck(command: str, tmp_path: Path) -> None:
    """Also the scripts inside: the commands for the hosts of a slice, and that of a container."""
    shown, scripts = dry_run(command), []
    if command == "k8s":
        yaml = pytest.importorskip("yaml")
        service, job = yaml.safe_load_all(shown)
        assert service["metadata"] == job["metadata"]
        pod = job["spec"]["template"]["spec"]
        assert pod["subdomain"] == service["metadata"]["name"] == service["spec"]["selector"]["job-name"]
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
        assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
        scripts.append(pod["containers"][0]["command"][2])
    else:
        scripts.append(shown)
        words = [word for line in shown.splitlines() for word in shlex.split(line, comments=True)]
        scripts += [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    for number, script in enumerate(scripts):
        path = tmp_path / f"{number}.sh"
        path.write_text(script if script.startswith("#!") else f"#!/usr/bin/env bash\n{script}\n")
        shellcheck(path)
    # The trainer's own flags arrive as they were given, through however many shells.
    lines = [line for script in scripts for line in script.splitlines() if "gcloud" not in line]
    line = next(line for line in lines if "decay_rules" in line)
    assert TRAIN[2] in shlex.split(line.removesuffix("\\"))


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("pod", ["--nam=x"], "there is no flag --nam; the flags are --name --project"),
        ("pod", ["--name=x", *TRAIN], "--project=... is missing"),
        ("pod", ["my-slice"], "my-slice is no flag"),
        ("pod", POD, "the trainer's flags must follow --, with --config=FILE at least"),
        ("slurm", ["--nodes=many", "--time=1", "--workdir=x", *TRAIN], "--nodes is many"),
        ("slurm", ["--time=1", "--workdir=x", *TRAIN], "--nodes=... is missing"),
        ("k8s", [*K8S, "--claim=", "--select=a", "--dry-run", *TRAIN], "--select is a; it must be LABEL=VALUE"),
        ("k8s", [*K8S[1:], "--name=S_16", *TRAIN], "--name is S_16"),
        ("k8s", [*K8S[:-1], "--workdir=/tmp/x", *TRAIN], "--workdir is /tmp/x; it must lie in /run/vit_scaling"),
    ],
)
def test_mistakes_are_one_sentence(command: str, arguments: list[str], sentence: str) -> None:
    done = launch(command, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def fake(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_pod_is_made_anew_after_a_preemption_until_there_is_a_result(tmp_path: Path) -> None:
    """A slice that is preempted once, and then trains to the end; gcloud is a stand-in that notes what it is asked."""
    log, tools = tmp_path / "log", tmp_path / "bin"
    fake(tools, "sleep", "true")
    fake(
        tools,
        "gcloud",
        f"""echo "$4 $*" | cut -d' ' -f1,6- >>{log}
        case $4 in
        describe) sed -n "$(grep -c ^describe {log})p" {tmp_path}/states ;;
        ssh)
          [[ $* != *kill\\ -0* ]] || exit 1
          [[ $* != *result.json* ]] || [ "$(grep -c result.json {log})" -ge 3 ] || exit 1
          ;;
        esac""",
    )
    (tmp_path / "states").write_text("\nPREEMPTED\nREADY\n")
    done = launch("pod", *POD, *TRAIN, path=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    asked = [line.split()[0] for line in log.read_text().splitlines()]
    round_ = ["ssh", "scp", "ssh", "ssh", "ssh", "ssh"]  # does it run; install, start, follow; is there a result
    assert asked == [
        *("describe", "create", *round_),
        *("describe", "delete", "create", *round_),
        *("describe", *round_),
    ]
    assert "finished: /mnt/runs/s16" in done.stderr


def test_a_host_that_is_stopped_lets_its_trainer_save(tmp_path: Path) -> None:
    """SIGTERM comes to both, as when a machine is shut down; a new start stops the old one in the same way."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv").mkdir()
    saves = f"trap 'sleep 2.5; echo saved >>{tmp_path}/calls; exit 0' TERM; echo began >>{tmp_path}/calls"
    fake(tmp_path / ".venv" / "bin", "python", f"{saves}; [ -e {tmp_path}/second ] || while true; do sleep 0.1; done")
    command = [str(tmp_path / "launch" / "host.sh"), str(tmp_path), "--config=a"]
    calls = tmp_path / "calls"
    first = subprocess.Popen(command, start_new_session=True)
    while not calls.exists():
        time.sleep(0.05)
    (tmp_path / "previous.pid").write_text(f"{first.pid}\n")
    (tmp_path / "second").touch()
    (tmp_path / "result.json").touch()
    second = subprocess.Popen(command)
    assert first.wait(timeout=30) == 143
    assert second.wait(timeout=30) == 0
    assert calls.read_text().split() == ["began", "saved", "began"]


@pytest.mark.parametrize(("codes", "left"), [("1 143 0", 0), ("2", 2)])
def test_a_host_begins_again_unless_the_trainer_says_what_is_wrong(tmp_path: Path, codes: str, left: int) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    fake(tmp_path / "bin", "sleep", "true")
    (tmp_path / ".venv").mkdir()
    fake(
        tmp_path / ".venv" / "bin",
        "python",
        f"""echo "$*" >>{tmp_path}/calls
        set -- {codes}; shift $(($(wc -l <{tmp_path}/calls) - 1))
        [ $# -gt 1 ] || [ "$1" -ne 0 ] || touch {tmp_path}/result.json
        exit "$1" """,
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [str(tmp_path / "launch" / "host.sh"), str(tmp_path), "--config=a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == left, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"-m vit_scaling.train --workdir={tmp_path} --config=a"] * len(codes.split())


@pytest.mark.parametrize(("command", "tool"), [("slurm", "sbatch"), ("k8s", "kubectl")])
def test_what_is_shown_is_what_is_submitted(command: str, tool: str, tmp_path: Path) -> None:
    fake(tmp_path / "bin", tool, f"cat >{tmp_path}/submitted")
    done = launch(command, *ARGUMENTS[command], *TRAIN, path=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "submitted").read_text() == done.stdout != ""
