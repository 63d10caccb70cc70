"""Records per second of ArrayRecord shards that lie in a bucket, read there and from a copy.

    pip install -e ".[test]"
    python benchmarks/bucket_reading.py

2,000 records of 110 kB, the size of an ImageNet JPEG, lie in 40 shards in a bucket server on this machine. It answers
after --latency seconds. Records are read in random order by the source that training uses. The library asks for a shard
from a record on to its end, and closes the connection after the record. This server prepares the whole answer, so the
shards are small. It uses no encryption, which costs a real bucket more time for each connection.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.training import bucket as buckets  # noqa: E402
from vit_scaling import paths  # noqa: E402
from vit_scaling.data import records, sources  # noqa: E402

RECORDS, SIZE, SHARDS = 2_000, 110_000, 40


def write_set(folder: pathlib.Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    generator, entries = np.random.default_rng(0), []
    for shard in range(SHARDS):
        name = f"train-{shard:05d}-of-{SHARDS:05d}.array_record"
        writer = ArrayRecordWriter(str(folder / name), "group_size:1")
        for number in range(RECORDS // SHARDS):
            writer.write(records.pack(str(number), 0, generator.bytes(SIZE)))
        writer.close()
        entries.append({"file": name, "num_examples": RECORDS // SHARDS})
    train = {"num_examples": RECORDS, "shards": entries}
    manifest = {"format": records.FORMAT, "num_classes": 1, "class_names": None, "multi_label": False}
    (folder / records.MANIFEST).write_text(json.dumps(manifest | {"splits": {"train": train}}))


def rate(read: Callable[[int], object], threads: int, seconds: float = 10.0) -> float:
    """Returns records per second that so many threads read in random order."""
    order = np.random.default_rng(1).permutation(RECORDS).tolist()
    done, start = 0, time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for first in range(0, RECORDS, 2 * threads):
            done += len(list(pool.map(read, order[first : first + 2 * threads])))
            if time.perf_counter() - start > seconds:
                break
        return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    latency = parser.parse_args().latency
    with buckets.serve() as bucket, tempfile.TemporaryDirectory() as parent:
        os.environ |= bucket.environment
        here, copy, there = pathlib.Path(parent) / "set", pathlib.Path(parent) / "copy", paths.place("gs://bucket/set")
        here.mkdir()
        copy.mkdir()
        write_set(here)
        paths.upload(here, there)
        bucket.rule = lambda _: time.sleep(latency)
        source = sources.open_source(sources.parse(str(there)))
        for threads in (1, 4, 16, 64):
            before = len(bucket.requests)
            found = rate(source.__getitem__, threads)
            asked = len(bucket.requests) - before
            print(f"in the bucket, {threads:2d} threads: {found:8,.0f} records/s, {asked} requests", flush=True)
        start = time.perf_counter()
        for file in there.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        print(f"copying it first:          {RECORDS / (time.perf_counter() - start):8,.0f} records/s")
        source = sources.open_source(sources.parse(str(copy)))
        for threads in (1, 4, 16):
            print(f"from the copy, {threads:2d} threads: {rate(source.__getitem__, threads):8,.0f} records/s")


if __name__ == "__main__":
    main()
