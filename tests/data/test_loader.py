"""Batches: a pure function of (seed, step), whole on any number of hosts, and never silently wrong or stuck."""

import gc
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from tests import children
from vit_scaling import TransientError, UserError
from vit_scaling.data import loader, sources
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images import codec, transforms
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.loader import Shard
from vit_scaling.data.sources import SourceConfig
from vit_scaling.data.sources import mixture as mixture_module
from vit_scaling.data.sources.mixture import MixtureSource

AUGMENT = transforms.transform(TransformConfig((12, 12), flip=0.5, randaugment="timm", erase=0.3), train=True)
PLAIN = transforms.transform(TransformConfig((12, 12), crop="resize"), train=False)
COUNT, BATCH = 29, 24  # a batch is nearly an epoch, so that most of them cross the end of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 noisy JPEGs of three classes."""
    import cv2

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), (32, 24))
        (root / "all" / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "all" / f"class{number % 3}" / f"{number}.jpg"), image)
    return root


@pytest.fixture(scope="module")
def source(folder):
    return sources.open_source(SourceConfig("folder", str(folder), "all"))


class Numbers:
    """A source whose image i is i everywhere, with whatever mishaps a test asks for."""

    num_classes, class_names, multi_label = 10, None, False

    def __init__(self, count, corrupt=(), kill=None, stuck=None):
        self.count, self.corrupt, self.kill, self.stuck = count, corrupt, kill, stuck

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.corrupt:
            raise codec.CorruptImageError("made so")
        if index == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.stuck:
            time.sleep(60)
        return {"image": np.full((4, 4), index, np.uint8), "label": np.int32(index % 10)}

    def id(self, index):
        return f"number {index}"


class Files(Numbers):
    """A source of encoded files."""

    def __init__(self, files):
        super().__init__(len(files))
        self.files = files

    def __getitem__(self, index):
        return {"image": self.files[index], "label": np.int32(0)}


class AsItIs:
    """A transform that changes nothing and adds what it drew to the label."""

    size = (4, 4)

    def __call__(self, record, rng, out=None):
        return {"image": np.repeat(record["image"][..., None], 3, 2), "label": record["label"]}


def train_batches(source, transform, *, seed, start_step=0, parts=(0,), part_count=1, **fields):
    shard = Shard(parts, part_count)
    return loader.train_batches(source, transform, DataConfig(**fields), seed=seed, start_step=start_step, shard=shard)


def eval_batches(source, transform, *, batch_size, parts=(0,), part_count=1, **fields):
    shard = Shard(parts, part_count)
    return loader.eval_batches(source, transform, DataConfig(**fields), batch_size=batch_size, shard=shard)


def values(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def take(count, *args, **options):
    batches = train_batches(*args, seed=5, **options)
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


@pytest.fixture(scope="module")
def reference(source):
    """The first global batches, read by one thread of one host in one go."""
    return take(7, source, AUGMENT, batch_size=BATCH, threads=1)


def assert_equal(batch, reference, hosts, host):
    size = BATCH // hosts
    for key, value in reference.items():
        np.testing.assert_array_equal(batch[key], value[host * size : (host + 1) * size])


@settings(max_examples=25, deadline=None)
@given(
    hosts=st.sampled_from([1, 2, 3, 8]), start=st.integers(0, 5), threads=st.integers(1, 4), prefetch=st.integers(1, 9)
)
def test_batches_do_not_depend_on_hosts_threads_or_restarts(source, reference, hosts, start, threads, prefetch):
    for host in range(hosts):
        options = {"start_step": start, "parts": (host,), "part_count": hosts}
        batches = take(2, source, AUGMENT, batch_size=BATCH, threads=threads, prefetch=prefetch, **options)
        for step, batch in enumerate(batches, start):
            assert_equal(batch, reference[step], hosts, host)


def test_batches_do_not_depend_on_worker_processes(source, reference):
    """Every pair of host count and worker count, each from another host and another restart point."""
    cases = list(itertools.product([1, 2, 3, 8], [1, 4]))
    rng = np.random.default_rng(0)
    for hosts, workers in cases:
        host, start = int(rng.integers(hosts)), int(rng.integers(4))
        options = {"start_step": start, "parts": (host,), "part_count": hosts, "workers": workers, "threads": 1}
        batches = take(3, source, AUGMENT, batch_size=BATCH, **options)
        for step, batch in enumerate(batches, start):
            assert_equal(batch, reference[step], hosts, host)


def test_another_seed_is_another_order_and_another_augmentation(source, reference):
    other = next(train_batches(source, AUGMENT, batch_size=BATCH, seed=6))
    assert not np.array_equal(other["label"], reference[0]["label"])
    assert not np.array_equal(other["image"], reference[0]["image"])


def test_every_epoch_holds_every_example_once_in_a_new_order():
    batches = take(30, Numbers(20), AsItIs(), batch_size=8)
    sequence = [value for batch in batches for value in values(batch)]
    epochs = [sequence[start : start + 20] for start in range(0, 240, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert all(batch["label"].dtype == np.int32 for batch in batches)


def test_the_same_image_is_augmented_anew_in_every_epoch(folder):
    one = sources.open_source(SourceConfig("folder", str(folder), "all[:1]"))
    images = [batch["image"].tobytes() for batch in take(8, one, AUGMENT, batch_size=1)]
    assert len(set(images)) > 5
    other = train_batches(one, AUGMENT, batch_size=1, seed=6)
    assert [next(other)["image"].tobytes() for _ in range(8)] != images


def test_repeats_follow_each_other_with_different_augmentation(source, folder):
    assert [values(b) for b in take(4, Numbers(10), AsItIs(), batch_size=6, repeats=3)] == [
        [x for value in values(b) for x in [value] * 3] for b in take(4, Numbers(10), AsItIs(), batch_size=2)
    ]
    (batch,) = take(1, source, AUGMENT, batch_size=6, repeats=6)
    assert len(set(batch["label"].tolist())) == 1
    assert len({image.tobytes() for image in batch["image"]}) > 3


def test_a_mixture_keeps_its_weights_and_every_parts_epochs(monkeypatch):
    parts = {"a": Numbers(10), "b": Numbers(30)}
    opened = sources.open_source
    monkeypatch.setattr(mixture_module, "open_source", lambda config: parts.get(config.name) or opened(config))
    config = SourceConfig("mixture", parts=(SourceConfig(name="a"), SourceConfig(name="b")), weights=(3.0, 1.0))
    mixture = opened(config)
    assert (len(mixture), mixture.id(9), mixture.id(10)) == (40, "number 9", "number 0")
    read = []
    monkeypatch.setattr(MixtureSource, "__getitem__", lambda self, i: read.append(i) or self.parts[0][0])
    batches = train_batches(mixture, AsItIs(), batch_size=20, seed=0, threads=1, prefetch=1)
    list(itertools.islice(batches, 10))
    batches.close()
    first = [i for i in read[:200] if i < 10]
    assert len(first) == 150  # three in four, exactly
    assert all(sorted(first[start : start + 10]) == list(range(10)) for start in range(0, 150, 10))
    second = [i for i in read[:200] if i >= 10]
    assert sorted(second[:30]) == list(range(10, 40))


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 24, 29, 49])
def test_evaluation_sees_every_example_once_on_any_number_of_hosts(hosts, count):
    seen, steps = [], set()
    for host in range(hosts):
        batches = list(eval_batches(Numbers(count), AsItIs(), batch_size=24, parts=(host,), part_count=hosts))
        steps.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (24 // hosts, 4, 4, 3)
            assert (batch["image"][~batch["mask"]] == 0).all()
            seen += np.array(values(batch))[batch["mask"]].tolist()
    assert sorted(seen) == list(range(count))
    assert steps == {-(-count // 24)}


def test_evaluation_is_in_the_order_of_the_source():
    batches = eval_batches(Numbers(20), AsItIs(), batch_size=8, threads=3)
    assert [value for batch in batches for value in values(batch)][:20] == list(range(20))


def test_multi_hot_labels_are_float32_batches():
    class Tagged(Numbers):
        multi_label = True

        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": np.eye(10, dtype=np.float32)[index % 10]}

    (batch,) = take(1, Tagged(20), AsItIs(), batch_size=8)
    assert (batch["label"].shape, batch["label"].dtype) == ((8, 10), np.float32)
    *_, last = eval_batches(Tagged(20), AsItIs(), batch_size=8)
    assert last["label"].shape == (8, 10)
    assert last["mask"].tolist() == [True] * 4 + [False] * 4


# ---- mishaps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_stops_the_run_with_its_name(workers):
    with pytest.raises(codec.CorruptImageError, match=r"^number 7 is corrupt: made so \(on_corrupt=skip"):
        take(3, Numbers(20, corrupt=[7]), AsItIs(), batch_size=20, workers=workers)
    with pytest.raises(codec.CorruptImageError, match="number 7"):
        list(eval_batches(Numbers(20, corrupt=[7]), AsItIs(), batch_size=20))


def test_a_skipped_record_is_counted_named_and_replaced_the_same_way_every_time(caplog):
    good = take(3, Numbers(20), AsItIs(), batch_size=20)
    replaced = {7: 9, 8: 9, 19: 0}
    for options in ({}, {"threads": 4}, {"workers": 2}):
        batches = train_batches(
            Numbers(20, corrupt=list(replaced)), AsItIs(), batch_size=20, seed=5, on_corrupt="skip", **options
        )
        for want, got in zip(good, batches, strict=False):
            assert values(got) == [replaced.get(value, value) for value in values(want)]
        assert (
            batches.counts["skipped"] >= 3 * 4
        )  # 7 leads to 8, which is corrupt too; what is read ahead counts as well
        batches.close()
    assert "number 19 is corrupt: made so; skipped" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_composited_images_and_decoder_warnings_are_counted(workers, caplog):
    """Of four images one is transparent and one lacks its end marker."""
    white = Image.new("RGB", (32, 32), "white")
    jpeg, clear = io.BytesIO(), io.BytesIO()
    white.save(jpeg, "jpeg")
    Image.new("RGBA", (32, 32)).save(clear, "png")
    files = [jpeg.getvalue(), jpeg.getvalue()[:-2], clear.getvalue(), jpeg.getvalue()]
    batches = eval_batches(Files(files), PLAIN, batch_size=4, workers=workers)
    (batch,) = batches
    assert (batch["image"] == 255).all()
    assert batches.counts == {"skipped": 0, "alpha": 1, "warning": 1, "unlabelled": 0, "unmatched": 0}
    assert batches.summary == "1 transparent, 1 decoded with a warning"
    assert workers or "number 1: the JPEG file has no end-of-image marker" in caplog.text


def test_evaluation_leaves_a_skipped_record_out():
    (batch,) = eval_batches(Numbers(8, corrupt=[3]), AsItIs(), batch_size=8, on_corrupt="skip")
    assert batch["mask"].tolist() == [True, True, True, False, True, True, True, True]


def test_unlabelled_records_are_left_out_in_training_and_evaluation_and_counted():
    class Partly(Numbers):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record | {"label": np.int32(-1)} if index in (3, 7) else record

    evaluation = eval_batches(Partly(8), AsItIs(), batch_size=8)
    (batch,) = evaluation
    assert batch["mask"].tolist() == [True, True, True, False, True, True, True, False]
    assert evaluation.counts["unlabelled"] == 2
    seen = take(3, Partly(8), AsItIs(), batch_size=8)
    assert {value for batch in seen for value in values(batch)} == {0, 1, 2, 4, 5, 6}
    assert all((batch["label"] >= 0).all() for batch in seen)


def test_a_set_of_nothing_but_corrupt_records_is_an_error():
    with pytest.raises(codec.CorruptImageError, match="records after it are corrupt"):
        take(1, Numbers(20, corrupt=range(20)), AsItIs(), batch_size=2, on_corrupt="skip")


def test_a_record_that_cannot_be_read_or_used_is_named(folder):
    (folder / "gone").mkdir()
    lost = sources.open_source(SourceConfig("folder", str(folder), "all"))
    path = lost.id(3)
    os.rename(path, path + ".away")
    try:
        with pytest.raises(TransientError, match=f"{os.path.basename(path)} cannot be read: .*No such file"):
            list(eval_batches(lost, PLAIN, batch_size=4))
    finally:
        os.rename(path + ".away", path)
    broken = Numbers(8)
    broken.__class__ = type(
        "Broken", (Numbers,), {"__getitem__": lambda self, i: (_ for _ in ()).throw(RuntimeError("disk"))}
    )
    for workers in (0, 1):
        with pytest.raises(TransientError, match=r"number \d+ cannot be read: disk"):
            take(1, broken, AsItIs(), batch_size=2, workers=workers)
    with pytest.raises(UserError, match=r"number \d+ cannot be used: crop='none'"):
        take(1, Numbers(8), transforms.transform(TransformConfig((9, 9), crop="none"), train=True), batch_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stuck_reader_is_reported_with_its_record(workers):
    start = time.monotonic()
    batches = train_batches(Numbers(20, stuck=11), AsItIs(), batch_size=20, seed=5, workers=workers, timeout=1.0)
    with pytest.raises(RuntimeError, match="number 11 has been read for"):
        next(batches)
    assert time.monotonic() - start < 20


def test_a_dead_worker_is_reported_with_its_record():
    with pytest.raises(RuntimeError, match="worker process died while it read number 11"):
        take(1, Numbers(20, kill=11), AsItIs(), batch_size=20, workers=1)


def test_workers_outlive_signals_but_not_the_training_process():
    """Ctrl-C reaches them too, even while they start, and batches are still needed; after kill -9 none is left."""
    code = (
        "import multiprocessing, sys, test_loader as t\n"
        "if __name__ == '__main__':\n"
        "    batches = t.train_batches(t.Numbers(20), t.AsItIs(), batch_size=4, seed=5, workers=2, threads=1)\n"
        "    while len(multiprocessing.active_children()) < 2: pass\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    for line in sys.stdin:\n"
        "        print(sum(len(next(batches)['label']) for _ in range(50)), flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM)):
        os.kill(worker, number)
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "200\n"
    process.kill()
    process.wait()
    assert children.end(workers)


def test_a_stuck_thread_does_not_keep_the_process_alive(tmp_path):
    code = (
        "import test_loader as t\n"
        "b = t.train_batches(t.Numbers(20, stuck=11), t.AsItIs(), batch_size=20, seed=5, timeout=0.5)\n"
        "next(b)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=45)
    assert done.returncode == 1
    assert "number 11 has been read for" in done.stderr.splitlines()[-1]


def test_python_ends_cleanly_in_the_middle_of_reading():
    """Threads that Python kills while they are in OpenCV end the process with SIGABRT."""
    code = (
        "import cv2, numpy, test_loader as t\n"
        "class Long(t.AsItIs):\n"
        "    def __call__(self, record, rng, out=None):\n"
        "        cv2.resize(numpy.zeros((999, 999), numpy.uint8), (9999, 9999), interpolation=cv2.INTER_LANCZOS4)\n"
        "        return super().__call__(record, rng)\n"
        "batches = t.train_batches(t.Numbers(20), Long(), batch_size=1, seed=5, threads=2)\n"
        "next(batches)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=45)
    assert done.returncode == 0, done.stderr


def test_dropped_and_closed_iterators_leave_no_thread_behind():
    before = threading.active_count()
    for _ in range(5):
        next(train_batches(Numbers(20), AsItIs(), batch_size=4, seed=0, threads=3))
    closed = train_batches(Numbers(20), AsItIs(), batch_size=4, seed=0, threads=3)
    next(closed)
    closed.close()
    with pytest.raises(StopIteration):
        next(closed)
    list(eval_batches(Numbers(20), AsItIs(), batch_size=4))
    gc.collect()
    assert threading.active_count() <= before


def test_batches_are_read_ahead_but_no_further_than_asked():
    read = []

    class Counted(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = train_batches(Counted(20), AsItIs(), batch_size=5, seed=0, threads=1, prefetch=3)
    deadline = time.monotonic() + 10
    while len(read) < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(read) == 15
    batches.close()


# ---- devices, imports, messages --------------------------------------------------------------------------------------


def test_to_device_keeps_order_content_and_sharding():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    host = take(5, Numbers(20), AsItIs(), batch_size=8)
    drawn = []
    device = list(loader.to_device((drawn.append(None) or batch for batch in host), sharding, ahead=2))
    assert len(device) == 5
    for want, got in zip(host, device, strict=True):
        assert got["image"].sharding == sharding
        np.testing.assert_array_equal(got["image"], want["image"])
        np.testing.assert_array_equal(got["label"], want["label"])
    drawn.clear()
    next(loader.to_device((drawn.append(None) or batch for batch in host), sharding, ahead=2))
    assert len(drawn) == 3


def test_reading_needs_no_tensorflow(folder):
    code = (
        "import sys\n"
        "from vit_scaling.data import config, loader, sources\n"
        "from vit_scaling.data.images import transforms\n"
        f"source = sources.open_source(sources.SourceConfig('folder', {str(folder)!r}, 'all'))\n"
        "t = transforms.transform(transforms.TransformConfig((8, 8)), train=True)\n"
        "next(loader.train_batches(source, t, config.DataConfig(batch_size=4), seed=0))\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 21}, "the batch of 21 is larger than the data set of 20"),
        ({"part_count": 3}, "batch_size 8 must be a positive multiple of its 3 parts"),
        ({"parts": (2,), "part_count": 2}, r"parts \(2,\) of a batch"),
        ({"seed": -1}, "seed -1"),
        ({"start_step": -1}, "first step -1"),
        ({"repeats": 0}, "data.repeats is 0"),
        ({"on_corrupt": "ignore"}, "choose one of error, skip"),
        ({"threads": 0}, "data.threads is 0 and must be at least 1"),
        ({"prefetch": 0}, "data.prefetch is 0"),
        ({"workers": -1}, "data.workers is -1"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train_batches(Numbers(20), AsItIs(), **({"batch_size": 8, "seed": 0} | options))


def test_an_empty_evaluation_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        eval_batches(Numbers(0), AsItIs(), batch_size=8)


def test_erase_noise_differs_between_positions():
    """The generator that Grain hands out is reset for every position: no two examples share their noise."""
    noisy = transforms.transform(TransformConfig((4, 4), crop="none", erase=1.0, erase_area=(0.2, 0.5)), train=True)
    (batch,) = take(1, Numbers(20), noisy, batch_size=20)
    assert len({image.tobytes() for image in batch["image"]}) == 20
