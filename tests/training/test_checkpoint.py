"""Checkpoints: complete or not read, this model's or refused, and at home on any mesh."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.interop import run
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.training import checkpoint
from vit_scaling.training.step import Program, build


def program(devices: int, config: c.Config | None = None, **axes: int) -> Program:
    config = c.resolve(config or tiny.config(), 100)
    mesh = mesh_lib.create(c.MeshConfig(**axes), jax.devices()[:devices])
    return build(config, num_classes=10, total_steps=8, mesh=mesh)


@pytest.fixture(autouse=True)
def split_small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The state of eight devices, (replica, data, model) = (1, 4, 2), saved at steps 1 to 5."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        state = program(8, data=4, model=2).init()
    writer = checkpoint.Checkpoints(directory, keep=2, permanent=2)
    for step in range(1, 6):
        state = dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))
        writer.save(step, state, {"seconds": {"step": float(step)}})
    writer.close()
    return directory, jax.device_get(state)


def test_the_last_few_and_the_permanent_ones_stay(saved: tuple[Path, Any]) -> None:
    assert checkpoint.steps(saved[0]) == [2, 4, 5]
    assert checkpoint.steps(saved[0] / "nowhere") == []


@pytest.mark.parametrize(("devices", "axes"), [(8, {"data": 8}), (4, {"data": 2, "model": 2}), (1, {})])
def test_eight_devices_state_on_other_meshes(saved: tuple[Path, Any], devices: int, axes: dict[str, int]) -> None:
    built = program(devices, **axes)
    state, record = checkpoint.restore(saved[0] / "5", built.state_shape)
    assert record["seconds"] == {"step": 5.0}
    for leaf, shape, old in zip(
        jax.tree.leaves(state), jax.tree.leaves(built.state_shape), jax.tree.leaves(saved[1]), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, old)


def test_unfinished_checkpoints_are_ignored(saved: tuple[Path, Any], tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved[0], directory)
    (directory / "9").mkdir()  # made, nothing in it
    (directory / "10.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)  # being written
    shutil.copytree(directory / "5", directory / "11")
    shutil.rmtree(directory / "11" / "state")  # half gone
    shutil.copytree(directory / "5", directory / "12")
    (directory / "12" / run.MARKER).unlink()  # all but the end
    assert checkpoint.steps(directory) == [2, 4, 5]
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.restore(directory / "9", program(1).state_shape)
    # The next run saves that very step.
    built = program(1)
    state, _ = checkpoint.restore(directory / "5", built.state_shape)
    writer = checkpoint.Checkpoints(directory, keep=2, permanent=2)
    writer.save(9, state, {})
    writer.close()
    assert checkpoint.steps(directory) == [2, 4, 5, 9] or checkpoint.steps(directory) == [2, 4, 9]


def test_another_models_checkpoint_is_refused_by_name(saved: tuple[Path, Any]) -> None:
    wide = dataclasses.replace(tiny.config(), model=tiny.model(mlp=64))
    with pytest.raises(ValueError, match=r"params/blocks/mlp/\w+/\w+ is \(2, .*\) there and \(2, .*\) here"):
        checkpoint.restore(saved[0] / "5", program(1, wide).state_shape)
    gap = dataclasses.replace(tiny.config(), model=tiny.model(pool="gap"))
    with pytest.raises(ValueError, match=r"params/pool/.* there and absent here|ema/pool/.* there and absent here"):
        checkpoint.restore(saved[0] / "5", program(1, gap).state_shape)
    adam = dataclasses.replace(tiny.config(), optim=c.OptimConfig(name="adam", ema=0.9))
    with pytest.raises(ValueError, match=r"another model or optimizer: .*opt_state/"):
        checkpoint.restore(saved[0] / "5", program(1, adam).state_shape)


# ---- Damage


def one(devices: int = 1) -> Any:
    return program(devices).state_shape


def same(state: Any, old: Any) -> None:
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """A workdir with checkpoints of the steps 1 and 2, on one device."""
    workdir = tmp_path_factory.mktemp("stepped")
    (workdir / "config.json").write_text('{"config": {}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        built = program(1)
    writer, states = checkpoint.Checkpoints(workdir / "checkpoints", keep=2, permanent=0), {}
    for step in (1, 2):
        state = dataclasses.replace(built.init(), step=jnp.int32(step))
        writer.save(step, state, {"seconds": {}, "run": "r"})
        states[step] = jax.device_get(state)
    writer.close()
    return workdir, states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_digests_do_not_depend_on_where_an_array_lies(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (8, 6, 2)).astype(jnp.dtype(dtype))
    mesh = mesh_lib.create(c.MeshConfig(data=4, model=2), jax.devices()[:8])
    spread = jax.device_put(values, jax.NamedSharding(mesh, jax.P("data", "model")))
    whole = jax.device_put(values, jax.devices()[0])
    expected = run.numpy_digest(values)
    assert run.digests({"a": spread, "b": spread[0]}) == {"a": expected, "b": run.numpy_digest(values[0])}
    assert run.digests([whole]) == {"0": expected}
    # Every single bit counts, and so does the order.
    bits = values.reshape(-1).view(np.uint8)
    for bit in range(0, 8 * bits.size, 7):
        bits[bit // 8] ^= 1 << bit % 8
        assert run.numpy_digest(values) != expected
        bits[bit // 8] ^= 1 << bit % 8
    swapped = values.copy()
    swapped[0], swapped[1] = values[1], values[0]
    assert run.numpy_digest(swapped) != expected
    assert run.numpy_digest(values[:, :, ::-1]) != expected


def test_chunks_of_a_large_array_make_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000, dtype=np.float32)
    expected = run.numpy_digest(values)
    monkeypatch.setattr(run, "_CHUNK", 7)
    assert run.numpy_digest(values) == expected


@pytest.fixture
def orbax_is_collected() -> Iterator[None]:
    """Orbax leaves event loops and coroutines behind when a read fails; they are collected before the next test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("orbax_is_collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("fault", ["deleted", "emptied", "halved", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_intact_one(
    stepped: tuple[Path, dict[int, Any]], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of its files is damaged: the state is that of step 2 or of step 1, to the bit, and step 1 is named."""
    shape, passed_over = one(), 0
    files = sorted(path.relative_to(stepped[0]) for path in (stepped[0] / "checkpoints" / "2").rglob("*"))
    files = [name for name in files if (stepped[0] / name).is_file()]
    # A flipped bit of an array only its digest shows, so no file is left out there, whatever Orbax named it.
    picked = files if fault in ("deleted", "flipped") else files[["emptied", "halved"].index(fault) :: 2]
    for number, name in enumerate(picked):
        workdir = tmp_path / str(number)
        shutil.copytree(stepped[0], workdir)
        data = bytearray((workdir / name).read_bytes())
        (workdir / name).unlink()
        if fault != "deleted":
            data[len(data) // 2] ^= 16 if fault == "flipped" else 0
            (workdir / name).write_bytes({"emptied": b"", "halved": data[: len(data) // 2]}.get(fault, data))
        found = checkpoint.restore_newest(workdir / "checkpoints", shape, "r")
        assert found is not None
        step = int(found[0].name)
        same(found[1], stepped[1][step])
        said = capsys.readouterr().out
        if step == 1 and name.name != run.MARKER:
            assert "is damaged" in said
            assert "kept as 2.damaged, and the run continues from step 1" in said
            assert (workdir / "checkpoints" / "2.damaged").is_dir()
            passed_over += 1
        shutil.rmtree(workdir)
    assert passed_over >= (5 if fault == "deleted" else 1)


def test_without_an_intact_checkpoint_nothing_is_touched(stepped: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    shutil.copytree(stepped[0], tmp_path / "run")
    for step in (1, 2):
        (tmp_path / "run" / "checkpoints" / str(step) / "record" / "metadata").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact, nothing was changed: .*/2 .*/1 "):
        checkpoint.restore_newest(tmp_path / "run" / "checkpoints", one(), "r")
    with pytest.raises(UserError, match="has no intact checkpoint"):
        run.read_arrays(tmp_path / "run", ("params",))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert checkpoint.restore_newest(tmp_path / "nowhere", one()) is None


def test_a_copy_under_another_step_or_from_another_run_is_refused(
    stepped: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    shutil.copytree(stepped[0], tmp_path / "run")
    directory = tmp_path / "run" / "checkpoints"
    shutil.copytree(directory / "1", directory / "7")
    with pytest.raises(run.DamagedError, match=r"7 holds the state of step 1, not of the step"):
        checkpoint.restore(directory / "7", one())
    found = checkpoint.restore_newest(directory, one(), "r")
    assert found is not None
    assert (found[0].name, (directory / "7.damaged").is_dir()) == ("2", True)
    with pytest.raises(UserError, match="was written by another run"):
        checkpoint.restore_newest(directory, one(), "another")


def test_arrays_of_a_damaged_checkpoint_are_not_read(stepped: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    """A workdir gives its newest intact checkpoint; a checkpoint asked for by name is refused."""
    shutil.copytree(stepped[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "2"
    assert run.find_checkpoint(tmp_path / "run") == newest
    found, parts = run.read_arrays(tmp_path / "run", ("params", "statistics"))
    same(parts["params"], stepped[1][2].params)
    assert (found, parts["statistics"]) == (newest, {})
    record = json.loads((newest / "record" / "metadata").read_text())
    path = next(path for path in record["digests"] if path.startswith("params/"))
    record["digests"][path] = "0" * 16
    record = run.seal({k: v for k, v in record.items() if k not in ("digests", "sha256")}, record["digests"])
    (newest / "record" / "metadata").write_text(json.dumps(record))
    with pytest.raises(run.DamagedError, match=f"the array {path} is not what was written"):
        run.read_arrays(newest, ("params",))
    found, parts = run.read_arrays(tmp_path / "run", ("params",))
    same(parts["params"], stepped[1][1].params)
    assert found.name == run.find_checkpoint(tmp_path / "run").name == "1"  # type: ignore[union-attr]


def test_a_save_that_never_finished_is_kept_aside_once(tmp_path: Path) -> None:
    for step in ("3", "5"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "part").write_text("x")
        checkpoint.Checkpoints(tmp_path, keep=2, permanent=0).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5.unfinished"]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("validation/accuracy", [0.1, 0.4, 0.3], 2),
        ("validation/loss", [3.0, 1.0, 2.0], 2),
        ("a/5shot_std", [2, 3, 4], 1),
    ],
)
def test_the_best_is_the_lowest_of_a_loss(metric: str, values: list[float], best: int, tmp_path: Path) -> None:
    keeper = checkpoint.Best(tmp_path, metric, "set")
    for step, value in enumerate(values, start=1):
        keeper.offer(step, {"a": jnp.float32(step)}, {metric: value})
    assert (keeper.step, checkpoint.steps(tmp_path / "best")) == (best, [best])
    again = checkpoint.Best(tmp_path, metric, "set")
    assert (again.step, again.value) == (best, values[best - 1])
    # Another metric or another set is not compared; a damaged record neither.
    for afresh in (
        checkpoint.Best(tmp_path, "other/accuracy", "set"),
        checkpoint.Best(tmp_path, metric, "another set"),
    ):
        assert afresh.step is None
    (tmp_path / "best.json").write_text('{"met')
    afresh = checkpoint.Best(tmp_path, metric, "set")
    assert afresh.step is None
    afresh.offer(1, {"a": jnp.float32(0)}, {metric: 100.0})
    assert checkpoint.steps(tmp_path / "best") == [1]
