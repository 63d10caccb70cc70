"""Real processes on this machine, talking through gloo: they start, agree, stop together and go on together.

One story serves most of the tests. Four processes, started as Slurm starts them, are stopped in the evaluation of step
4 by SIGTERM to one. Two go on, started as Open MPI starts them; one is killed. Two go on to the end. What they computed
is compared with single processes of as many devices.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from tests.clocks import FakeClock
from tests.parallel import host_config
from tests.training.test_loop import SPEED
from vit_scaling import TransientError, UserError, interop
from vit_scaling.parallel import interrupts, processes, sharding
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import checkpoint, loop, telemetry

ROOT = Path(__file__).parents[2]
DEADLINE = 400.0  # seconds after which processes that have not ended are killed
WATCHDOG = 60.0


class Ended(NamedTuple):
    codes: list[int]
    outputs: list[str]
    seconds: list[float]  # when each ended, since all were started


@pytest.fixture(autouse=True)
def _sharding_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of these tests changes what is split, for its own processes."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", sharding.MIN_SHARDED_SIZE)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def surroundings(way: str, count: int, process: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Returns the flags and the environment with which a process learns who it is."""
    if way == "slurm":
        return [], {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
            "JAX_COORDINATOR_PORT": str(port),
        }
    if way == "mpirun":
        return [], {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": str(count),
            "OMPI_COMM_WORLD_RANK": str(process),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
            "OMPI_VERSION": "4.1.4",
            "JAX_COORDINATOR_PORT": str(port),
        }
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={process}"], {}


def launch(
    workdir: Path, count: int, faults: str = "", *, way: str = "flags", own: dict[int, list[str]] | None = None
) -> Ended:
    """Runs the trainer in `count` processes of one device until all have ended. `own` are flags of single processes."""
    port, started = free_port(), time.monotonic()
    running, logs = [], []
    for process in range(count):
        flags, environment = surroundings(way, count, process, port)
        records = workdir.with_name(f"{workdir.name}_rows_{count}")
        records.mkdir(exist_ok=True)
        environment |= {"JAX_NUM_CPU_DEVICES": "1", "HOST_RECORDS": str(records), "PYTHONPATH": str(ROOT)}
        config = [f"--config=tests/parallel/host_config.py:{faults}", f"--config.log.watchdog={WATCHDOG}"]
        command = [sys.executable, "-m", "vit_scaling.train", f"--workdir={workdir}", *config, *flags]
        logs.append(workdir.with_name(f"{workdir.name}_{process}.log"))
        with logs[-1].open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, *(own or {}).get(process, [])],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    seconds = [0.0] * count
    while not all(seconds) and time.monotonic() - started < DEADLINE:
        time.sleep(0.02)
        for process, one in enumerate(running):
            if not seconds[process] and one.poll() is not None:
                seconds[process] = time.monotonic() - started
    for one in running:
        one.kill()  # which is nothing to one that has ended
    return Ended([one.wait() for one in running], [log.read_text() for log in logs], seconds)


def alone(workdir: Path, devices: int) -> list[dict[str, Any]]:
    """Returns the rows of the same run, or of the rest of one, in this process."""
    create = mesh_lib.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:devices]))
        patch.setattr(sharding, "MIN_SHARDED_SIZE", sharding.MIN_SHARDED_SIZE)
        loop.train(host_config.get_config(), workdir)
    return rows(workdir)


def rows(workdir: Path) -> list[dict[str, Any]]:
    kept = telemetry.read_jsonl(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in SPEED} for row in kept]


class Story(NamedTuple):
    four: Ended
    killed: Ended
    last: Ended
    saved: list[list[int]]  # the checkpoints after each part
    clocks: list[dict[str, float]]  # clock.json after each part
    rows: list[dict[str, Any]]
    alone: list[dict[str, Any]]  # one process of four devices, from the beginning
    rest: list[dict[str, Any]]  # one process of two devices, from where the four processes stopped
    records: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("hosts")
    run, saved, clocks = folder / "run", [], []

    def part(count: int, faults: str, way: str, *own: str) -> Ended:
        ended = launch(run, count, faults, way=way, own={process: list(own) for process in range(count)})
        saved.append(checkpoint.steps(run / "checkpoints"))
        clocks.append(json.loads((run / "clock.json").read_text())["seconds"])
        return ended

    four = part(4, "3:evaluation:4", "slurm")
    shutil.copytree(run, folder / "rest")
    killed = part(2, "1:sigkill:6", "mpirun")
    last = part(2, "", "flags", "--config.export=('vit_scaling',)")
    return Story(
        four, killed, last, saved, clocks, rows(run), alone(folder / "alone", 4), alone(folder / "rest", 2), folder
    )


def test_sigterm_to_one_stops_all_at_one_step_even_while_they_measure(story: Story) -> None:
    assert story.four.codes == [0, 0, 0, 0], story.four.outputs
    assert "stopped at step 4" in story.four.outputs[0]
    assert story.saved[0] == [4]


def test_kill_nine_of_one_ends_the_other_in_time(story: Story) -> None:
    assert story.killed.codes[1] == -signal.SIGKILL
    assert story.killed.codes[0] not in (0, -signal.SIGKILL), story.killed.outputs[0]
    assert story.killed.seconds[0] - story.killed.seconds[1] < WATCHDOG
    assert story.saved[1] == [4]


def test_losses_are_one_processs(story: Story) -> None:
    """Sums over four devices may be made in another order; over two there is only one."""
    assert story.last.codes == [0, 0], story.last.outputs
    assert [row["step"] for row in story.rows] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    for several, one in zip(story.rows, story.alone, strict=True):
        assert several == pytest.approx(one, rel=1e-5, abs=1e-6), several["step"]
    losses = [row["loss"] for row in story.rows if "loss" in row]
    assert len(set(losses)) >= 7  # the first two are the same: the head begins at zero


def test_one_process_of_several_exports_the_weights(story: Story) -> None:
    exported = story.records / "run" / "export"
    said = [output.count(f"exported {exported / 'vit_scaling'}") for output in story.last.outputs]
    assert said == [1, 0], story.last.outputs
    assert [path.name for path in exported.iterdir()] == ["vit_scaling"]
    own, other = interop.read(story.records / "run"), interop.read(exported / "vit_scaling")
    assert own.leaves.keys() == other.leaves.keys()
    for name, leaf in own.leaves.items():
        np.testing.assert_array_equal(other.leaves[name], leaf)


def test_a_restart_is_bitwise_the_run_that_was_not_stopped(story: Story) -> None:
    """From step 4 on, two processes that were stopped and killed, and one of two devices that was not."""
    assert story.rows == story.rest


def test_slices_are_disjoint_and_the_batches_are_the_same_on_half_the_processes(story: Story) -> None:
    def read(count: int, process: int) -> dict[int, list[int]]:
        path = story.records / f"run_rows_{count}" / f"{process}.json"
        return {int(step): sums for step, sums in json.loads(path.read_text()).items()}

    four, two = ([read(count, process) for process in range(count)] for count in (4, 2))
    reference = loop.loader.train_batches  # restored by then: the recording one belongs to other processes
    config = host_config.get_config()
    source = loop.open_source(config.data.train)
    augment = loop.transform(config.data.transform, train=True)
    batches = reference(source, augment, config.data, seed=config.seed)
    whole = {step: [host_config.checksum(image) for image in next(batches)["image"]] for step in range(1, 9)}
    batches.close()
    for step in range(1, 9):
        assert len(set(whole[step])) == 16
        parts = four if step <= 4 else two
        assert [part for host in parts for part in host[step]] == whole[step], step
        assert all(len(host[step]) == 16 // len(parts) for host in parts)


def test_clocks_survive_and_name_what_was_lost(story: Story) -> None:
    stopped, killed, last = story.clocks
    assert "lost" not in stopped
    for kind in ("start", "compile", "evaluation", "step"):
        assert last[kind] >= stopped[kind] > 0
    # A checkpoint holds what was booked when its save began. The wait for its end is lost if a later process is killed.
    assert last["checkpoint"] > 0
    assert stopped["checkpoint"] > 0
    in_checkpoint = json.loads((story.records / "run" / "checkpoints" / "4" / "record" / "metadata").read_text())
    assert last["lost"] == pytest.approx(sum(killed.values()) - sum(in_checkpoint["seconds"].values()), abs=0.01)
    shares = [
        row["useful_share"] for row in telemetry.read_jsonl(story.records / "run" / "metrics.jsonl") if "loss" in row
    ]
    assert shares[-1] == pytest.approx(last["step"] / sum(last.values()), abs=0.1)


def test_processes_that_differ_refuse_to_start_and_say_in_what(tmp_path: Path) -> None:
    own = {1: ["--config.optim.lr=0.5", "--config.data.train.split=train[:90]"]}
    ended = launch(tmp_path / "run", 2, "1:stranger:0", own=own)
    assert ended.codes == [2, 2], ended.outputs
    for output in ended.outputs:
        sentence = output.strip().splitlines()[-1]
        assert sentence.startswith("error: process 0 (there) and process 1 (here) are not about to do the same: ")
        assert "config.optim.lr is 0.003 there and 0.5 here" in sentence
        assert "sets.data.train.examples is 100 there and 90 here" in sentence
        assert sentence.endswith("; and 2 more")
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


TALK = """
import os, signal, sys
from vit_scaling import TransientError, UserError
from vit_scaling.parallel import processes
from vit_scaling.parallel.interrupts import StopRequest
process = int(sys.argv[1])
processes.start(f"127.0.0.1:{sys.argv[2]}", 2, process)
assert processes.gather({"a": process}) == [{"a": 0}, {"a": 1}]
assert processes.tell(process + 7) == 7
assert processes.first(lambda: process + 5) == 5

def claim():
    assert process == 0, "only process 0 is asked"
    raise UserError("the workdir is another's")

for failing in (claim, lambda: 1):
    try:
        if failing is claim:
            processes.first(claim)
        else:
            with processes.together():
                if process == 1:
                    raise FileNotFoundError("no data here")
    except (UserError, TransientError, FileNotFoundError) as error:
        print(type(error).__name__, error, flush=True)

answers = []
with StopRequest() as stop:
    for call in range(6):
        if (process, call) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(int(stop.asked()))
print(answers, flush=True)
processes.leave(3 + process)
"""


def test_what_one_process_finds_all_know() -> None:
    """What is wrong in one ends all, with its sentence; a signal to one at its fourth call stops all at the fifth."""
    port = str(free_port())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TALK, process, port], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for process in "01"
    ]
    try:
        said = [re.sub(r"\[Gloo\].*\n", "", one.communicate(timeout=100)[0]) for one in running]
    finally:
        for one in running:
            one.kill()
    assert said == [
        "UserError the workdir is another's\nTransientError process 1: no data here\n[0, 0, 0, 0, 1, 1]\n",
        "UserError process 0: the workdir is another's\nFileNotFoundError no data here\n[0, 0, 0, 0, 1, 1]\n",
    ]
    assert [one.returncode for one in running] == [3, 4]  # and neither waited for the other


# ---- one process -----------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
AT = {"num_processes": 2, "process_id": 1, "coordinator_address": "node01:61447"}  # 65536 - 4096 + 7
OWN_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
SHARED = SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
SHARED |= {"SLURM_LOCALID": "2", "SLURM_PROCID": "6"}
IN_SHARED = AT | {"num_processes": 8, "process_id": 6}
MPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPI4 = MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
MPI6 = MPI | {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d:c083:150e::3000:2]:43370"
}
IN_MPI = {"num_processes": 16, "process_id": 9, "local_device_ids": [1]}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


def gpus(visible: str, **more: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": visible} | more


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None, None), {}, None),
        ((None, 1, None), {}, None),
        (("host:1", 2, 1), {}, {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}),
        ((None, None, None), SLURM, AT | {"local_device_ids": [0]}),
        (
            (None, None, None),
            SLURM | {"SLURM_STEP_NODELIST": "node7,node9"},
            AT | {"coordinator_address": "node7:61447", "local_device_ids": [0]},
        ),
        # One process by hand inside an allocation of four; and a whole step where the allocation is of one.
        ((None, None, None), SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, AT | {"local_device_ids": [0]}),
        # Outside of a step: a shell of salloc, or the script of sbatch.
        ((None, None, None), {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, None),
        # A process that has a node to itself uses what it sees, whatever Slurm says of the node's GPUs.
        ((None, None, None), SLURM | OWN_NODE, AT),
        ((None, None, None), SLURM | OWN_NODE | gpus("0,1", SLURM_GPUS_ON_NODE="8"), AT),
        ((None, None, None), SLURM | OWN_NODE | {"SLURM_GPUS_ON_NODE": "gpu:8"}, AT),
        # Several on a node: one each of all that are visible, or what the scheduler left visible to each.
        ((None, None, None), SHARED, IN_SHARED | {"local_device_ids": [2]}),
        ((None, None, None), SHARED | gpus("0,1,2,3", SLURM_GPUS_ON_NODE="4"), IN_SHARED | {"local_device_ids": [2]}),
        (
            (None, None, None),
            SHARED | gpus("0,1,2,3", SLURM_GPUS_ON_NODE="gpu:4"),
            IN_SHARED | {"local_device_ids": [2]},
        ),
        ((None, None, None), SHARED | gpus("0"), IN_SHARED),
        ((None, None, None), SHARED | gpus("0,1", SLURM_GPUS_ON_NODE="8"), IN_SHARED),
        ((None, None, None), SHARED | gpus("0,1,2,3", SLURM_GPUS_ON_NODE="16"), IN_SHARED),
        (("host:1", None, None), MPI | SLURM, IN_MPI | {"coordinator_address": "host:1"}),
        ((None, None, None), MPI4, IN_MPI | {"coordinator_address": f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}"}),
        (
            (None, None, None),
            MPI6 | {"JAX_COORDINATOR_PORT": "5"},
            IN_MPI | {"coordinator_address": "fe80::b9b:ac5d:9cf0:b858:5"},
        ),
        (
            ("host:1", None, None),
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            {"num_processes": 16, "process_id": 9, "coordinator_address": "host:1"},
        ),
    ],
)
def test_who_a_process_is(given: Any, environment: dict[str, str], expected: Any) -> None:
    found = processes.arguments(*given, environment | NO_TPU)
    if found is not None:
        assert found.pop("cluster_detection_method") == "deactivate"
    assert found == expected


@pytest.mark.parametrize("environment", [SLURM, SLURM | {"SLURM_STEP_NODELIST": "a-1,b"}, MPI4, MPI6])
def test_the_coordinator_is_where_jax_would_look_for_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax._src.clusters import ompi_cluster, slurm_cluster

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster = ompi_cluster.OmpiCluster if "OMPI_COMM_WORLD_SIZE" in environment else slurm_cluster.SlurmCluster
    found = processes.arguments(None, None, None, environment | NO_TPU)
    assert found is not None
    assert found["coordinator_address"] == cluster.get_coordinator_address(None, None)


def test_a_port_that_is_taken_is_said_before_jax_dies_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(jax.distributed, "initialize", lambda **found: pytest.fail("started"))
        with pytest.raises(TransientError, match=f"port {port} of the coordinator 127.0.0.1:{port} is taken"):
            processes.start(f"127.0.0.1:{port}", 2, 0)
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **found: started.append(found["process_id"]))
    processes.start(f"127.0.0.1:{port}", 2, 0)
    processes.start(f"127.0.0.1:{port}", 2, 1)
    assert started == [0, 1]


def test_processes_with_unlike_devices_are_refused() -> None:
    processes.check_devices([0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match="process 0 has 2 devices and process 2 has 1; all processes of a run need"):
        processes.check_devices([0, 0, 1, 1, 2])


def test_a_waiting_process_prints_for_whom_where_and_how_long_and_gives_up(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's own."""
    assert (processes._REPORT_SECONDS, processes.START_SECONDS) == (30, 300)
    exits: list[int] = []
    monkeypatch.setattr(processes.os, "_exit", exits.append)  # which returns, so that one more line follows
    found = {"num_processes": 4, "process_id": 0, "coordinator_address": "node01:61447"}
    clock = FakeClock(1)
    with processes._waiting(found, clock):
        clock.over.wait(20.0)
    others = "the other 3 of 4 processes to connect to node01:61447"
    assert capfd.readouterr().err == f"process 0 has waited 30 s for {others}; it gives up after 300 s\n"
    assert (clock.waits, exits) == ([30.0, 30.0], [])
    clock = FakeClock(10)
    with processes._waiting(found | {"process_id": 2}, clock):
        clock.over.wait(20.0)
    lines = capfd.readouterr().err.splitlines()[:-1]
    assert (len(lines), exits) == (10, [1])
    assert lines[0] == "process 2 has waited 30 s for process 0 of 4 at node01:61447; it gives up after 300 s"
    assert lines[-1] == (
        "error: process 2 has waited 300 s for process 0 of 4 at node01:61447; start all processes within 300 s"
    )


def test_a_platform_without_its_plugin_is_one_sentence() -> None:
    code = (
        "from vit_scaling.parallel import mesh\n"
        "try: mesh.create(mesh.MeshConfig())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("UserError JAX finds no device with JAX_PLATFORMS='cuda'")
    assert "./run.sh install cuda" in ended.stdout


@pytest.mark.parametrize(
    ("given", "environment", "sentence"),
    [
        (("host:1", None, None), {}, "--num_processes and --process_id must be given too"),
        ((None, 2, 0), {}, "--coordinator must be given too"),
        (("host:1", 2, 2), {}, "--process_id is 2; with 2 processes it must be from 0 to 1"),
        (("host:1", 2, -1), {}, "--process_id is -1"),
        (("host", 2, 0), {}, "--coordinator is 'host'; it must be HOST:PORT"),
        (("host:1", 0, 0), {}, "--num_processes is 0"),
        ((None, None, 5), SLURM, "--process_id is 5; with 2 processes"),
        ((None, None, None), MPI, "Open MPI 5 does not say on which host process 0 runs"),
    ],
)
def test_flags_that_do_not_fit_are_named(given: Any, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        processes.arguments(*given, environment | NO_TPU)


def test_tpu_chips_are_left_to_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    assert processes.arguments(None, None, None, {}) == {}
    assert processes.arguments(None, None, None, {"JAX_PLATFORMS": "cpu"}) is None
    assert processes.arguments(None, None, None, NO_TPU) is None


@pytest.mark.parametrize(
    ("places", "own", "expected"),
    [
        ([0, 2, 4, 6], [2, 3], ((2, 3), 4)),  # one part a device
        ([0, 0, 2, 2], [2, 3], ((1,), 2)),  # two devices along `model` share a part
        ([0, 2, 4, 6], [0, 2], ((0, 2), 4)),  # a host's chips are no neighbours in the mesh
        ([6, 4, 2, 0], [0, 1], ((2, 3), 4)),  # the mesh has another order than the devices
    ],
)
def test_a_process_reads_the_parts_that_its_devices_hold(places: list[int], own: list[int], expected: Any) -> None:
    on = mock.create_autospec(jax.sharding.NamedSharding, instance=True)
    on.num_devices = len(places)
    on.devices_indices_map.return_value = {device: (slice(place, None),) for device, place in enumerate(places)}
    on.addressable_devices = set(own)
    assert sharding.batch_parts(on) == expected


def test_batches_lie_in_order_on_a_mesh_of_any_order() -> None:
    devices = [jax.devices()[number] for number in (0, 4, 1, 5, 2, 6, 3, 7)]
    mesh = jax.sharding.Mesh(devices, "data", axis_types=(jax.sharding.AxisType.Auto,))
    value = np.arange(32).reshape(16, 2)
    on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = sharding.put_batch({"a": value}, on)["a"]
    np.testing.assert_array_equal(placed, value)
    assert {shard.device: shard.data.shape for shard in placed.addressable_shards} == dict.fromkeys(devices, (2, 2))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_second_signal_ends_at_once() -> None:
    ended = python(
        "import os, signal; from vit_scaling.parallel.interrupts import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    assert not stop.asked()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.asked()\n"
        "    print('saving', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGINT, "saving\n"), ended.stderr
    assert ended.stderr == ("stop requested: saving after this step or compilation; a second signal ends it\n")


def test_a_stop_request_is_acknowledged_while_python_is_blocked_and_a_second_one_ends() -> None:
    """Hashing in C stands for a compilation: one long call in which Python runs no signal handlers."""
    code = (
        "import hashlib, os, signal, threading, time; from vit_scaling.parallel.interrupts import StopRequest\n"
        "def twice():\n"
        "    for _ in range(2): time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)\n"
        "with StopRequest():\n"
        "    threading.Thread(target=twice).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**8)\n"
        "    print('not ended')\n"
    )
    ended = python(code)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, ""), ended.stderr


def test_an_interrupt_ends_a_compilation_at_once() -> None:
    ended = python(
        "import hashlib, os, signal, threading; from vit_scaling.parallel import interrupts\n"
        "interrupts.exit_on_interrupt()\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**8)\n"
    )
    assert (ended.returncode, ended.stderr) == (130, "stopped\n")


def test_the_watchdog_is_set_anew_by_each_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's own: of faulthandler's timer, only what it is set to."""
    timer: list[float | None] = []
    monkeypatch.setattr(
        interrupts.faulthandler,
        "dump_traceback_later",
        lambda seconds, *, exit, file: timer.append(seconds if exit else None),
    )
    monkeypatch.setattr(interrupts.faulthandler, "cancel_dump_traceback_later", lambda: timer.append(None))
    watchdog = interrupts.Watchdog(0.5)
    watchdog.beat()
    watchdog.beat(compiles=True)
    watchdog.beat()
    watchdog.close()
    interrupts.Watchdog(0.0).beat()  # is off
    assert timer == [0.5, 0.5 + interrupts.COMPILE_SECONDS, 0.5, None]


def test_the_watchdog_shows_where_a_process_hangs_and_ends_it() -> None:
    ended = python(
        "import time; from vit_scaling.parallel.interrupts import Watchdog\n"
        "def hang(): time.sleep(50)\n"
        "Watchdog(0.2).beat(); hang()\n"
    )
    assert ended.returncode == 1
    assert "Timeout (0:00:00.2" in ended.stderr
    assert "in hang" in ended.stderr
