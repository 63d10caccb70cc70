"""The processes of a run: how they find each other, and how they exchange small values.

One process needs nothing. Several find each other by what Cloud TPU, Slurm or Open MPI put into their environment, or
by explicit flags. What they exchange are small JSON values, through the coordinator that jax.distributed runs beside
process 0; arrays go over the devices. All processes must call the functions that exchange something, in one order.
"""

import collections
import contextlib
import errno
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from vit_scaling import TransientError, UserError

WAIT_SECONDS = 600.0  # how far apart the processes may be before a step: they open the same data
START_SECONDS = 300.0  # how far apart they may start
_REPORT_SECONDS = 30.0  # between two lines of a process that waits for others to start

_exchange = itertools.count()  # every exchange needs a name of its own


# ---- start -----------------------------------------------------------------------------------------------------------


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its run; call it before anything touches a device.

    Args:
        coordinator: host:port of process 0, reachable from all others.
        num_processes: how many processes there are, this one included.
        process_id: which of them this is, from 0 on.

    Where all are None, Slurm, Open MPI and Cloud TPU are asked; where none of them has started this process, it is
    alone. Under Slurm and Open MPI what is given comes before what they say.

    Raises:
        UserError: the arguments do not fit each other, some are missing, or the processes have unlike devices.
        TransientError: the coordinator's port is taken.
    """
    found = arguments(coordinator, num_processes, process_id, os.environ)
    if found is None:
        return
    # JAX's preemption service takes SIGTERM for itself; interrupts.py has its own agreement.
    jax.config.update("jax_enable_preemption_service", False)
    address = found.get("coordinator_address")
    if address is not None and found["process_id"] == 0:
        _check_port(address)
    try:
        with _waiting(found):
            jax.distributed.initialize(**found, initialization_timeout=int(2 * START_SECONDS))
    except ValueError as error:
        raise UserError(
            f"JAX does not find the other processes ({str(error).rstrip('.')}): give --coordinator=HOST:PORT, "
            f"--num_processes and --process_id, or --num_processes=1 for this process alone"
        ) from error
    check_devices(device.process_index for device in devices())


def devices() -> list[jax.Device]:
    """Returns the devices of the run, of all its processes.

    Raises:
        UserError: JAX finds no device of the platform that was asked for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a plugin
        reason = f" ({str(error).splitlines()[0].rstrip('.')})" if str(error) else ""
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}{reason}: install the "
            "plugin with ./run.sh install cuda or tpu, or unset JAX_PLATFORMS"
        ) from error


def check_devices(owners: Iterable[int]) -> None:
    """Raises UserError unless all processes have the same number of devices.

    Args:
        owners: for each device of the run the process that has it.
    """
    counts = collections.Counter(owners)
    odd = next((process for process in sorted(counts) if counts[process] != counts[0]), None)
    if odd is not None:
        raise UserError(
            f"process 0 has {counts[0]} devices and process {odd} has {counts[odd]}; all processes of a run need the "
            "same number: see CUDA_VISIBLE_DEVICES and what the scheduler gave to each"
        )


def _check_port(address: str) -> None:
    """Raises TransientError if this host cannot listen on the coordinator's port."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise TransientError(
                f"port {port} of the coordinator {address} is taken by another program on this host: wait until that "
                "has ended, or give --coordinator=HOST:PORT with another port to all processes"
            ) from error


@contextlib.contextmanager
def _waiting(found: Mapping[str, Any], arrived: threading.Event | None = None) -> Iterator[None]:
    """Prints every 30 s for whom this process waits, and ends it after START_SECONDS, before JAX would abort."""
    arrived = threading.Event() if arrived is None else arrived
    count, number = found.get("num_processes", 0), found.get("process_id")
    if number is None:
        whom = "the other hosts of the slice"
    elif number == 0:
        whom = f"the other {count - 1} of {count} processes to connect to {found.get('coordinator_address', 'it')}"
    else:
        whom = f"process 0 of {count} at {found.get('coordinator_address', 'an address that JAX finds')}"

    def report() -> None:
        waited = 0.0
        while not arrived.wait(_REPORT_SECONDS):
            waited += _REPORT_SECONDS
            text = f"process {number or 0} has waited {waited:g} s for {whom}"
            if waited >= START_SECONDS:
                os.write(2, f"error: {text}; start all processes within {START_SECONDS:g} s\n".encode())
                os._exit(1)
            os.write(2, f"{text}; it gives up after {START_SECONDS:g} s\n".encode())

    threading.Thread(target=report, name="waiting for processes", daemon=True).start()
    try:
        yield
    finally:
        arrived.set()


def arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns the arguments of jax.distributed.initialize, which finds what is not among them; None for one process.

    Raises:
        UserError: see `start`.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, as 10.0.0.1:8476")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes is {num_processes}; it must be at least 1")

    cluster = _open_mpi(environment) or _slurm(environment)  # in this order: mpirun starts processes in steps of Slurm
    if not cluster:
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if len(missing) == 3:
            return {} if _on_cloud_tpu(environment) else None
        if num_processes == 1 and not process_id:
            return None
        if missing:
            raise UserError(
                f"{' and '.join(missing)} must be given too: neither Slurm nor Open MPI started this process, so "
                f"--coordinator=HOST:PORT, --num_processes and --process_id are needed together"
            )
    count = num_processes if num_processes is not None else cluster["num_processes"]
    number = process_id if process_id is not None else cluster["process_id"]
    if not 0 <= number < count:
        raise UserError(f"--process_id is {number}; with {count} processes it must be from 0 to {count - 1}")
    if count == 1:
        return None
    found = cluster | {"num_processes": count, "process_id": number}
    if coordinator is not None:
        found["coordinator_address"] = coordinator
    elif "coordinator_address" not in found:
        raise UserError(
            "Open MPI 5 does not say on which host process 0 runs: give --coordinator=HOST:PORT, the rest is known"
        )
    return found | {"cluster_detection_method": "deactivate"}  # everything is known


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what srun says of this task; nothing outside of a step, or in a step of one task.

    SLURM_NTASKS is the allocation's number in a step that was started by hand inside of it, so the step's own counts
    (jax#30073, levanter#1043).
    """
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in needed):
        return {}
    count = int(environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]))
    if count == 1:
        return {}
    # "node[01-02,07],other" and "node01,node02" begin with node01.
    host = re.sub(r"\[(\w+)[^\]]*\](.*)", r"\1", environment["SLURM_STEP_NODELIST"]).partition(",")[0]
    own_node = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) is not None
    return {
        "num_processes": count,
        "process_id": int(environment["SLURM_PROCID"]),
        "coordinator_address": f"{host}:{_port(int(environment['SLURM_JOB_ID']), environment)}",
    } | _share_of_node(environment, int(environment["SLURM_LOCALID"]), own_node)


def _open_mpi(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns what mpirun says of this process; nothing outside of one, or where it started one alone."""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) == 1:
        return {}
    found: dict[str, Any] = {
        "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
        "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
    }
    # Such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911: the job's number, and addresses of mpirun's host.
    uri = re.match(r"(\d+)\..*?(?:tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]])", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri is not None:
        found["coordinator_address"] = f"{uri[2] or uri[3]}:{_port(int(uri[1]) // 2**12, environment)}"
    own_node = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return found | _share_of_node(environment, int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), own_node)


def _port(number: int, environment: Mapping[str, str]) -> int:
    """Returns the coordinator's port, derived from a job's number as JAX does: one of the 4,096 up to 65,535."""
    return int(environment.get("JAX_COORDINATOR_PORT", 65_536 - 2**12 + number % 2**12))


def _share_of_node(environment: Mapping[str, str], local: int, own_node: bool) -> dict[str, Any]:
    """Returns which GPUs of its node a process uses, where that is not all that are visible to it.

    Args:
        environment: variables of the process.
        local: number of the process on its node.
        own_node: no other process of the run is on its node.

    Several processes on a node take one GPU each. But a scheduler may have narrowed what each of them sees, and then
    JAX counts from 0 within that (jax#28194, #23452): what is visible decides.
    """
    visible = [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    on_node = re.search(r"(\d+)$", environment.get("SLURM_GPUS_ON_NODE", ""))  # "8", or "gpu:8"
    narrowed = visible and (len(visible) <= local or (on_node is not None and len(visible) < int(on_node[1])))
    return {} if own_node or narrowed or len(visible) == 1 else {"local_device_ids": [local]}


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips that the run may use. JAX, when imported, notes in the environment if not."""
    return (
        "TPU_SKIP_MDS_QUERY" not in environment
        and importlib.util.find_spec("libtpu") is not None
        and (environment.get("JAX_PLATFORMS") or "tpu").partition(",")[0] == "tpu"
    )


# ---- exchange --------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def gather(value: Any) -> list[Any]:
    """Returns the values that all processes give, in the order of the processes. They are small, and JSON."""
    if jax.process_count() == 1:
        return [value]
    topic = f"vit_scaling/{next(_exchange)}"
    _client().key_value_set(f"{topic}/{jax.process_index()}", json.dumps(value))
    try:
        _client().wait_at_barrier(topic, int(WAIT_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise TransientError(
            f"not all of the {jax.process_count()} processes reached this point within {WAIT_SECONDS:.0f} s of this "
            f"one; their logs say why: {str(error).splitlines()[0]}"
        ) from error
    answers = {int(key.rpartition("/")[2]): text for key, text in _client().key_value_dir_get(topic)}
    return [json.loads(answers[process]) for process in range(jax.process_count())]


def tell(value: Any) -> Any:
    """Returns, in every process, the value of process 0; what the others give is not looked at."""
    if jax.process_count() == 1:
        return value
    topic = f"vit_scaling/{next(_exchange)}"
    if is_first():
        _client().key_value_set(topic, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(topic, int(WAIT_SECONDS * 1000)))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes all processes fail where one does: each raises its own error, or names the process that had one.

    What is done inside must not wait for other processes.

    Raises:
        UserError: another process failed with one; the sentence is its own.
        TransientError: another process failed with any other error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    own = None if failure is None else [str(failure) or type(failure).__name__, isinstance(failure, UserError)]
    answers = gather(own)
    if failure is not None:
        raise failure
    for process, answer in enumerate(answers):
        if answer is not None:
            sentence, from_user = answer
            raise (UserError if from_user else TransientError)(f"process {process}: {sentence}")


def first(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0 alone and returns its result, which must be JSON, in all.

    Raises:
        Exception: what it raised, in process 0.
        UserError: the same sentence, in the others.
    """
    value = None
    with together():
        if is_first():
            value = function()
    return tell(value)


def leave(code: int) -> NoReturn:
    """Exits after an error of which the other processes may not know.

    One process exits as usual. Of several, none waits for the others: jax.distributed would, for minutes. Process 0
    gives them time to print their errors, as they end with the coordinator.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    if is_first():
        time.sleep(2.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _client() -> Any:
    from jax._src import distributed  # no public name leads to the coordinator's key-value store

    return distributed.global_state.client
