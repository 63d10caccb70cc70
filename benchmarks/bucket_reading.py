"""Ways to read ArrayRecord shards that lie in a bucket: by the library, by range requests, and from a copy.

    pip install -e ".[test]"
    python benchmarks/bucket_reading.py

A shard of 2,000 records of 110 kB, the size of an ImageNet JPEG, lies in a bucket server on this machine, whose answers
come after --latency seconds, as they would from a data center. Range requests fetch records in random order, one
request each, as a reader of shuffled records has to. Prints records per second.
"""

import argparse
import concurrent.futures
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

RECORDS, SIZE = 2_000, 110_000


def rate(read: Callable[[int], object], count: int, threads: int) -> float:
    """Returns records per second of `count` reads in random order."""
    order = np.random.default_rng(0).permutation(RECORDS)[:count].tolist()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(read, order))
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    latency = parser.parse_args().latency
    from array_record.python import array_record_data_source, array_record_module

    with buckets.serve() as bucket, tempfile.TemporaryDirectory() as folder:
        os.environ |= bucket.environment
        import fsspec

        local, remote = f"{folder}/a.array_record", "gs://bucket/set/a.array_record"
        writer, generator = array_record_module.ArrayRecordWriter(local, "group_size:1"), np.random.default_rng(0)
        for _ in range(RECORDS):
            writer.write(generator.bytes(SIZE))
        writer.close()
        files = fsspec.filesystem("gs")
        files.put_file(local, remote)
        bucket.rule = lambda request: time.sleep(latency)
        try:
            array_record_data_source.ArrayRecordDataSource([remote])[0]
            print("the library reads gs:// itself")
        except Exception as error:
            print(f"the library does not read gs://: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        for threads in (1, 16):
            read = lambda i: files.cat_file(remote, start=i * SIZE, end=(i + 1) * SIZE)  # noqa: E731
            print(
                f"range requests, {threads:2d} threads: {rate(read, 20 * threads, threads):8,.0f} records/s", flush=True
            )
        start = time.perf_counter()
        files.get_file(remote, f"{folder}/copy.array_record")
        print(f"copying the shard:           {RECORDS / (time.perf_counter() - start):8,.0f} records/s")
        source = array_record_data_source.ArrayRecordDataSource([f"{folder}/copy.array_record"])
        for threads in (1, 16):
            print(f"from the copy, {threads:2d} threads: {rate(source.__getitem__, RECORDS, threads):8,.0f} records/s")


if __name__ == "__main__":
    main()
