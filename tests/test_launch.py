"""The launchers: what they would do, word for word, and when they start again, stop and give up."""

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
        ["./run.sh", command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
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
        words = [word for line in shown.replace("\\\n", " ").splitlines() for word in shlex.split(line, comments=True)]
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
        ("pod", ["my-slice"], "my-slice is not a flag"),
        ("pod", POD, "the trainer's flags must follow --, with --config=FILE at least"),
        ("slurm", ["--nodes=many", "--time=1", "--workdir=x", *TRAIN], "--nodes is many"),
        ("pod", [*(a for a in POD if "acc" not in a), "--accelerator=v9:2x2", *TRAIN], "--accelerator is v9:2x2"),
        ("pod", [*POD, "--slices=0", *TRAIN], "--slices is 0"),
        ("pod", [*POD, "--price-per-chip-hour=a", *TRAIN], "--price-per-chip-hour is a"),
        ("pod", [*(a for a in POD if "acc" not in a), "--accelerator=v5e", *TRAIN], "--accelerator is v5e; write"),
        ("slurm", ["--nodes=1", "--time=1", "--workdir=x", "--ntasks=4", *TRAIN], "--ntasks is set by this launcher"),
        ("slurm", ["--nodes=1", "--time=1", "--workdir=x", "--gpus-per-node=a", *TRAIN], "--gpus-per-node is a"),
        ("slurm", ["--time=1", "--workdir=x", *TRAIN], "--nodes=... is missing"),
        ("k8s", [*K8S, "--claim=", "--select=a", "--dry-run", *TRAIN], "--select is a; it must be LABEL=VALUE"),
        ("k8s", [*K8S[1:], "--name=S_16", *TRAIN], "--name is S_16"),
        ("k8s", [*K8S[:-1], "--workdir=/tmp/x", *TRAIN], "--workdir is /tmp/x; it must lie in /run/vit_scaling"),
        ("k8s", [*K8S[:-2], K8S[-1], *TRAIN], "--claim=... is missing"),
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


def gcloud(tmp_path: Path, states: str, codes: str, fails: str = "") -> str:
    """Makes stand-ins for gcloud, git and sleep, and returns a PATH with them.

    gcloud notes what it is asked in `log`. The slice has one of `states` after the other; a run on it ends with one of
    `codes` after the other, "-" where the host is gone; a pod that is still running is not modelled. Calls that are
    named in `fails`, such as "create 2" for the second create, fail.
    """
    log, tools = tmp_path / "log", tmp_path / "bin"
    (tmp_path / "states").write_text(states)
    (tmp_path / "fails").write_text(fails)
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    fake(tools, "sleep", f"echo $1 >>{tmp_path}/slept")
    fake(tools, "git", "")  # the tests also run where there is no repository
    fake(
        tools,
        "gcloud",
        f"""echo "$4 $*" | cut -d' ' -f1,6- >>{log}
        if grep -qx "$4 $(grep -c "^$4" {log})" {tmp_path}/fails; then echo "ERROR: no $4" >&2; exit 1; fi
        case $4 in
        describe) sed -n "$(grep -c ^describe {log})p" {tmp_path}/states ;;
        ssh)
          [[ $* != *kill\\ -0* ]] || exit 1
          if [[ $* == *host.code* ]]; then
            code=$(sed -n "$(grep -c host.code {log})p" {tmp_path}/codes)
            [ "$code" != - ] && echo "$code"
          fi
          ;;
        esac""",
    )
    return f"{tools}:{os.environ['PATH']}"


ROUND = ["ssh", "scp", "ssh", "ssh", "ssh", "ssh"]  # does it run; install, start, follow; how did it end
DELETE = "gcloud compute tpus tpu-vm delete my-slice --project=my-project --zone=my-zone"


def asked(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]


def test_a_pod_is_created_again_after_a_preemption_until_the_run_is_finished(tmp_path: Path) -> None:
    path = gcloud(tmp_path, "\nPREEMPTED\nREADY\n", "- 143 0")
    done = launch("pod", *POD, *TRAIN, path=path)
    assert done.returncode == 0, done.stderr
    assert asked(tmp_path) == [
        *("describe", "create", *ROUND),
        *("describe", "delete", "create", *ROUND),
        *("describe", *ROUND),
    ]
    assert "finished: /mnt/runs/s16" in done.stderr
    assert "my-slice costs money until it is deleted" in done.stderr
    assert done.stderr.rstrip().endswith(DELETE)


@pytest.mark.parametrize(
    ("code", "exit_code", "rounds", "sentence"),
    [
        ("2", 2, 1, "error: the trainer refused its flags, data or workdir"),
        ("1", 2, 1, "error: the trainer was given up after 10 short attempts"),
        (" ".join("-" * 20), 2, 10, "error: given up after 10 attempts in a row"),
    ],
)
def test_a_pod_that_cannot_work_stops_and_says_what_it_costs(
    tmp_path: Path, code: str, exit_code: int, rounds: int, sentence: str
) -> None:
    done = launch("pod", *POD, *TRAIN, path=gcloud(tmp_path, "READY\n" * 20, code))
    assert done.returncode == exit_code
    assert asked(tmp_path) == ["describe", *ROUND] * rounds
    assert sentence in done.stderr
    assert done.stderr.rstrip().endswith(DELETE)
    if rounds > 1:
        assert [int(word) for word in (tmp_path / "slept").read_text().split()] == [10, 20, 40, 80, *[120] * 5]


@pytest.mark.parametrize("command", ["slurm", "k8s"])
def test_a_bucket_reaches_the_trainer_as_it_is(command: str, tmp_path: Path) -> None:
    """And a script asks the bucket whether the run is finished, and makes no folder "gs:"."""
    given = [word for word in ARGUMENTS[command] if not word.startswith(("--workdir", "--claim"))]
    shown = launch(command, *given, "--workdir=gs://bucket/runs/s16", "--dry-run", *TRAIN)
    assert shown.returncode == 0, shown.stderr
    assert "-m vit_scaling.train --workdir=gs://bucket/runs/s16 --config=" in shown.stdout
    assert "paths.place(sys.argv[1])" in shown.stdout
    assert "result.json 2>/dev/null" not in shown.stdout
    if command == "k8s":
        yaml = pytest.importorskip("yaml")
        _, job = yaml.safe_load_all(shown.stdout)
        pod = job["spec"]["template"]["spec"]
        assert "volumes" not in pod
        assert "volumeMounts" not in pod["containers"][0]
        return
    tools = tmp_path / "bin"
    fake(tools, "srun", f"echo $* >>{tmp_path}/calls; exit 1")
    fake(tools, "scontrol", f"echo $* >>{tmp_path}/calls")
    fake(tools, "sleep", "true")
    fake(tools, "python", "exit 1")  # not finished
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = shown.stdout.replace(str(ROOT), str(tmp_path)).replace("module load cuda", "true")
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert " --workdir=gs://bucket/runs/s16 " in calls[0]
    assert calls[1] == "requeue 7"
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "calls", "s16.tries"}


TWO = [*POD, "--slices=2"]
ROUND_OF_TWO = ["ssh", *["scp"] * 2, *["ssh"] * 6]


def test_two_slices_are_one_queued_resource_and_one_run(tmp_path: Path) -> None:
    """It waits for capacity, is asked for again after a preemption, and is deleted when the run is finished."""
    states = "\nWAITING_FOR_RESOURCES\nPROVISIONING\nPROVISIONING\nACTIVE\nSUSPENDED\nACTIVE\n"
    path = gcloud(tmp_path, states, "- 0")
    done = launch("pod", *TWO, "--delete", *TRAIN, path=path)
    assert done.returncode == 0, done.stderr
    assert asked(tmp_path) == [
        *("describe", "create", *["describe"] * 4, *ROUND_OF_TWO),
        *("describe", "delete", "create", "describe", *ROUND_OF_TWO, "delete"),
    ]
    assert done.stderr.count("my-slice is PROVISIONING; looking again each minute") == 1
    lines = (tmp_path / "log").read_text().splitlines()
    place = "my-slice --project=my-project --zone=my-zone"
    version = "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=my-slice --spot"
    assert f"create {place} --accelerator-type=v5litepod-16 {version}" in lines
    assert lines[-1] == f"delete {place} --force --quiet"
    starts = [line for line in lines if "host.sh" in line]
    assert sorted(line.split()[1] for line in starts[:2]) == ["my-slice-0", "my-slice-1"]
    assert all("--config.mesh.replica=2 " in line for line in starts)
    assert "costs" not in done.stderr


@pytest.mark.parametrize(
    ("states", "codes", "fails", "exit_code", "sentence", "calls"),
    [
        ("\n", "", "create 1", 2, "gcloud did not create my-slice, as it says above; with --queued", ["create"]),
        ("READY\n", "0", "delete 1", 1, "my-slice could not be deleted", [*ROUND, "delete"]),
        ("READY\n", "2", "", 2, "error: the trainer refused its flags", [*ROUND, "delete"]),
        ("PREEMPTED\n\n", "0", "create 1", 0, "deleted my-slice", ["delete", "create", "describe", "create", *ROUND]),
        ("FAILED\n", "", "", 2, "error: the request for my-slice failed", []),
    ],
)
def test_slices_that_cannot_be_made_or_deleted(
    tmp_path: Path, states: str, codes: str, fails: str, exit_code: int, sentence: str, calls: list[str]
) -> None:
    path = gcloud(tmp_path, states, codes, fails)
    done = launch("pod", *POD, "--delete", "--price-per-chip-hour=1.2", *TRAIN, path=path)
    assert done.returncode == exit_code
    assert sentence in done.stderr
    assert asked(tmp_path)[1 : 1 + len(calls)] == calls
    undeleted = fails == "delete 1"
    assert ("my-slice costs 19.20 an hour (16 chips) until it is deleted" in done.stderr) == undeleted


def test_a_run_that_may_go_on_keeps_its_slices(tmp_path: Path) -> None:
    """The hosts cannot be reached: that is no sign that the run has ended."""
    done = launch("pod", *POD, "--delete", *TRAIN, path=gcloud(tmp_path, "READY\n" * 20, "- " * 20))
    assert done.returncode == 2
    assert "delete" not in asked(tmp_path)
    assert done.stderr.rstrip().endswith(DELETE)


def test_a_queued_slice_in_a_bucket(tmp_path: Path) -> None:
    """The hosts install what a bucket needs, and its name reaches the trainer as it is."""
    given = [word for word in POD if not word.startswith("--workdir")]
    shown = launch("pod", *given, "--workdir=gs://bucket/runs/s16", "--queued", "--dry-run", *TRAIN).stdout
    assert " --runtime-version=v2-alpha-tpuv5-lite --node-id=my-slice --spot\n" in shown
    assert "vit_scaling/run.sh install tpu,gcs" in shown
    assert "launch/host.sh gs://bucket/runs/s16 --config=" in shown


@pytest.mark.parametrize(
    ("accelerator", "flags"),
    [
        ("v5e:4x4", "--type=v5litepod --topology=4x4"),
        ("v5p:4x4x8", "--type=v5p --topology=4x4x8"),
        ("v5litepod-16", "--accelerator-type=v5litepod-16"),
    ],
)
def test_a_pod_takes_the_machines_of_the_plan(accelerator: str, flags: str) -> None:
    given = [word for word in POD if not word.startswith("--accelerator")]
    shown = launch("pod", *given, f"--accelerator={accelerator}", "--dry-run", *TRAIN)
    assert f" --zone=my-zone {flags} --version=v2-alpha-tpuv5-lite --spot\n" in shown.stdout
    from vit_scaling.planner import machines

    machines.topology(accelerator)  # and the plan takes the same name


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
    subprocess.run(["bash", "-c", result(tmp_path, tmp_path)], check=True)
    second = subprocess.Popen(command)
    assert first.wait(timeout=30) == 143
    assert second.wait(timeout=30) == 0
    assert calls.read_text().split() == ["began", "saved", "began"]


def result(workdir: Path, checkpoint: Path) -> str:
    """Returns a shell command that writes a result as the trainer does."""
    text = '{\\n  "step": 4,\\n  "checkpoint": "%s",\\n  "figure": "a"\\n}\\n'
    return f"printf '{text}' {checkpoint} >{workdir}/result.json"


@pytest.mark.parametrize(
    ("codes", "left", "attempts"),
    [
        ("1 143 0", 0, 3),  # until it is finished, whatever ended it before
        ("2 0", 2, 1),
        ("1 1 2 0", 2, 3),
        ("9 " * 20, 1, 10),  # a limit
        ("0 " * 9 + "2", 2, 10),  # stopped and saved, so not finished
    ],
)
def test_a_host_starts_again_until_it_is_finished_refused_or_given_up(
    tmp_path: Path, codes: str, left: int, attempts: int
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    fake(tmp_path / "bin", "sleep", f"echo $1 >>{tmp_path}/slept")
    (tmp_path / ".venv").mkdir()
    finishes = "true" if left else f"mkdir -p {tmp_path}/checkpoints/4; {result(tmp_path, tmp_path / 'checkpoints/4')}"
    fake(
        tmp_path / ".venv" / "bin",
        "python",
        f"""echo "$*" >>{tmp_path}/calls
        set -- {codes}; shift $(($(wc -l <{tmp_path}/calls) - 1))
        [ $1 -ne 0 ] || {{ {finishes}; }}
        exit "$1" """,
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [str(tmp_path / "launch" / "host.sh"), str(tmp_path), "--config=a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == left, done.stderr
    assert (tmp_path / "host.code").read_text() == f"{left}\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"-m vit_scaling.train --workdir={tmp_path} --config=a"] * attempts
    slept = (tmp_path / "slept").read_text().split() if attempts > 1 else []
    assert slept == ["10", "20", "40", "80", *["120"] * 5][: attempts - 1]
    assert ("refused its flags" in done.stderr) == (left == 2)
    assert ("given up" in done.stderr) == (left == 1)


def test_a_result_without_its_checkpoint_is_not_finished(tmp_path: Path) -> None:
    """The condition itself, as every launcher uses it."""
    workdir = tmp_path / "a b"
    workdir.mkdir()
    condition = f'source {ROOT}/launch/common.sh; eval "$(finished "$1")"'

    def finished() -> bool:
        return subprocess.run(["bash", "-uc", condition, "bash", str(workdir)], cwd=tmp_path).returncode == 0

    assert not finished()
    (workdir / "result.json").write_text('{\n  "step": 4\n}\n')
    assert not finished()
    subprocess.run(["bash", "-c", result(Path("a\\ b"), Path("a\\ b/checkpoints/4"))], cwd=tmp_path, check=True)
    assert not finished()
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    assert finished()
    from vit_scaling.training import workdir as workdirs

    workdirs.write_json(workdir / "result.json", {"checkpoint": "a b/checkpoints/5", "step": 5})
    assert not finished()
    (workdir / "checkpoints" / "5").mkdir()
    assert finished()


@pytest.mark.parametrize(
    ("code", "seconds", "tries", "finishes", "left", "queued"),
    [
        (0, 0, 0, True, 0, False),
        (2, 0, 0, False, 2, False),
        (1, 0, 0, False, 0, True),
        (0, 0, 8, False, 0, True),
        (1, 0, 9, False, 1, False),
        (1, 700, 9, False, 0, True),  # a long attempt is progress
    ],
)
def test_a_slurm_job_is_queued_again_unless_finished_refused_or_given_up(
    tmp_path: Path, code: int, seconds: int, tries: int, finishes: bool, left: int, queued: bool
) -> None:
    arguments = ["--nodes=1", "--time=1:00:00", f"--workdir={tmp_path / 's16'}", f"--setup=SECONDS={seconds}"]
    shown = launch("slurm", *arguments, "--dry-run", *TRAIN).stdout.replace(str(ROOT), str(tmp_path))
    (tmp_path / "s16").mkdir()
    (tmp_path / "s16.tries").write_text("\n" * tries)
    ends = result(tmp_path / "s16", tmp_path) if finishes else "true"
    fake(tmp_path / "bin", "srun", f"echo $2 >>{tmp_path}/calls; {ends}; exit {code}")
    fake(tmp_path / "bin", "scontrol", f"echo $* >>{tmp_path}/calls")
    fake(tmp_path / "bin", "sleep", f"echo sleep $1 >>{tmp_path}/calls")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_CPUS_ON_NODE": "12"}
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == left, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "--cpus-per-task=12"
    pause = [] if seconds else [f"sleep {10 * (tries + 1)}"]
    assert calls[1:] == ([*pause, "requeue 7"] if queued else [])


def test_slurm_passes_every_option_on() -> None:
    def options(*extra: str) -> set[str]:
        shown = launch("slurm", "--nodes=1", "--time=1", "--workdir=x", *extra, "--dry-run", *TRAIN).stdout
        return {line for line in shown.splitlines() if line.startswith("#SBATCH")}

    plain = options()
    assert "#SBATCH --cpus-per-task=8" in plain
    assert options("--exclusive", "--mail-type=END,FAIL", "--output=a.log") - plain == {
        "#SBATCH --exclusive",
        "#SBATCH --mail-type=END,FAIL",
        "#SBATCH --output=a.log",
    }
    assert "#SBATCH --cpus-per-task=32" in options("--gpus-per-node=a100:4")
    assert "#SBATCH --cpus-per-task=6" in options("--cpus-per-task=6", "--gpus-per-node=4")


@pytest.mark.parametrize(
    ("code", "finishes", "signal_first", "left"),
    [(0, True, False, 0), (0, False, False, 1), (2, False, False, 2), (9, False, False, 1), (0, False, True, 1)],
)
def test_a_pod_of_kubernetes_ends_with_a_code_that_the_job_understands(
    tmp_path: Path, code: int, finishes: bool, signal_first: bool, left: int
) -> None:
    """2 ends the job by its podFailurePolicy; 1 starts the pod again; the trainer's signal is passed on."""
    yaml = pytest.importorskip("yaml")
    _, job = yaml.safe_load_all(dry_run("k8s"))
    assert job["spec"]["backoffLimit"] == 400
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # without which there is no podFailurePolicy
    assert job["spec"]["podFailurePolicy"]["rules"][0] == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]},
    }
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    script = script.replace("/run/vit_scaling/s16", str(tmp_path))
    ends = result(tmp_path, tmp_path) if finishes else "true"
    waits = f"trap 'echo saved >{tmp_path}/saved; exit 0' TERM; touch {tmp_path}/began; while true; do sleep 0.05; done"
    fake(tmp_path / "bin", "python", waits if signal_first else f"{ends}; exit {code}")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
    pod = subprocess.Popen(["bash", "-c", script], env=environment)
    if signal_first:
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        pod.terminate()
    assert pod.wait(timeout=30) == left
    assert (tmp_path / "saved").exists() == signal_first


@pytest.mark.parametrize(("command", "tool"), [("slurm", "sbatch"), ("k8s", "kubectl")])
def test_what_is_shown_is_what_is_submitted(command: str, tool: str, tmp_path: Path) -> None:
    fake(tmp_path / "bin", tool, f"cat >{tmp_path}/submitted")
    done = launch(command, *ARGUMENTS[command], *TRAIN, path=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "submitted").read_text() == done.stdout != ""
