"""A run that starts from weights: they arrive whole, resized, in parameters and average; the rest stays a run."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import finetune, transfer_sweep
from tests import tiny
from vit_scaling import config as c
from vit_scaling import interop, models, names
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.models import adapt, swin
from vit_scaling.optim import optimizer as chain
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel.mesh import MeshConfig
from vit_scaling.studies import grid, runner
from vit_scaling.training import checkpoint, initial, loop
from vit_scaling.training import workdir as workdirs
from vit_scaling.training.step import build


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    create = mesh_lib.create
    monkeypatch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at 28 x 28, an average beside the parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "pretraining"
    create = mesh_lib.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
        loop.train(tiny.config(4), workdir)
    return workdir


def state_of(config: c.Config, found: Path) -> Any:
    config = c.resolve(config, 100)
    program = build(config, num_classes=10, total_steps=int(config.duration.amount), mesh=mesh_lib.create(config.mesh))
    return jax.device_get(checkpoint.restore(found, program.state_shape)[0])


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in names.flatten(tree).items()}


def fine_tuning(path: Any, size: tuple[int, int] = (28, 28), **init: Any) -> c.Config:
    """Two steps that move nothing but a counter: lr is zero."""
    config = tiny.config(2, init=c.InitConfig(path=str(path), **init))
    whole = TransformConfig(size=size, crop="resize")
    data = dataclasses.replace(config.data, transform=whole, eval_transform=whole)
    schedule = c.ScheduleConfig(kind="constant", warmup=c.Duration(0), cooldown=c.Duration(0))
    evaluation = dataclasses.replace(config.evaluation, every=c.Duration(1))
    return dataclasses.replace(
        config, data=data, schedule=schedule, evaluation=evaluation, optim=dataclasses.replace(config.optim, lr=0.0)
    )


def test_a_run_starts_from_a_file_at_a_rectangular_resolution(pretraining: Path, tmp_path: Path) -> None:
    """Every parameter of the trunk is the pretraining's, positions resized; the classifier starts from zero.

    The run that goes on does not need the file any more.
    """
    interop.write(initial.read(pretraining), tmp_path / "timm", layout="timm")
    config = fine_tuning(tmp_path / "timm", (42, 28))
    loop.train(config, tmp_path / "run")
    state = state_of(config, tmp_path / "run" / "checkpoints" / "2")
    before = state_of(tiny.config(4), pretraining / "checkpoints" / "4").params
    adapted = adapt.adapt(
        {k: np.asarray(v) for k, v in flat(before).items()},
        config.model,
        (28, 28),
        target=config.model,
        target_image_size=(42, 28),
        antialias=True,  # as timm resamples positions, because the file is timm's
    )
    after = flat(state.params)
    assert after["position_embedding"].shape == (6, 16)
    for path, leaf in adapted.items():
        expected = np.zeros_like(leaf) if path.startswith("head/") else leaf
        np.testing.assert_array_equal(after[path], expected, err_msg=path)
        np.testing.assert_array_equal(flat(state.ema)[path], expected, err_msg=path)

    (tmp_path / "timm" / "model.safetensors").unlink()
    record = tmp_path / "run" / "config.json"
    record.write_text(record.read_text().replace('"amount": 2', '"amount": 3'))
    assert loop.train(dataclasses.replace(config, duration=c.Duration(3)), tmp_path / "run")["step"] == 3


def test_files_and_checkpoints_hold_the_same(pretraining: Path, tmp_path: Path) -> None:
    weights = initial.read(pretraining)
    assert (weights.image_size, weights.num_classes, weights.config) == ((28, 28), 10, tiny.model())
    interop.write(weights, tmp_path / "own", layout="vit_scaling")
    again = initial.read(tmp_path / "own")
    for path, leaf in flat(again.parameters).items():
        np.testing.assert_array_equal(leaf, flat(weights.parameters)[path], err_msg=path)


def test_the_average_or_the_classifier_of_a_run(pretraining: Path) -> None:
    state = state_of(tiny.config(4), pretraining / "checkpoints" / "4")
    average = initial.start_of(fine_tuning(pretraining, ema=True, keep_head=True), 10)
    assert average is not None
    for path, leaf in flat(average.parameters).items():
        np.testing.assert_array_equal(leaf, flat(state.ema)[path], err_msg=path)
        assert path.endswith("bias") or not np.array_equal(leaf, flat(state.params)[path]), path
    mapped = initial.start_of(fine_tuning(pretraining, class_map=(3, 9)), 2)
    assert mapped is not None
    np.testing.assert_array_equal(mapped.parameters["head"]["kernel"], state.params["head"]["kernel"][:, [3, 9]])


def test_a_new_classifier_starts_where_the_loss_wants_it(pretraining: Path) -> None:
    config = dataclasses.replace(fine_tuning(pretraining), loss=c.LossConfig(kind="sigmoid", head_bias=-10.0))
    weights = initial.start_of(config, 7)
    assert weights is not None
    np.testing.assert_array_equal(weights.parameters["head"]["bias"], np.full(7, -10.0, np.float32))
    np.testing.assert_array_equal(weights.parameters["head"]["kernel"], np.zeros((16, 7), np.float32))


def test_parameters_arrive_on_every_mesh(pretraining: Path) -> None:
    """Split over eight devices, they are the same numbers with the program's shardings."""
    config = c.resolve(fine_tuning(pretraining), 100)
    grid = np.array(jax.devices()).reshape(mesh_lib.shape(MeshConfig(model=2), 8))
    mesh = jax.sharding.Mesh(grid, mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * grid.ndim)
    program = build(config, num_classes=10, total_steps=2, mesh=mesh)
    weights = initial.start_of(config, 10)
    assert weights is not None
    state = initial.begin(program, weights)
    for path, leaf in names.flatten(state.params).items():
        np.testing.assert_array_equal(leaf, names.flatten(weights.parameters)[path], err_msg=path)
        assert leaf.sharding == names.flatten(program.state_shape.params)[path].sharding


@pytest.mark.parametrize(
    ("init", "sentence"),
    [
        ({"path": "absent"}, "there is no weight file or folder 'absent'"),
        ({"keep_head": True, "class_map": (1,)}, "exclude each other"),
        ({"class_map": (1, 2)}, "class map has 2 entries"),
        ({"keep_head": True, "width": 32, "heads": 4}, "the weights' model.width is 16, and 32 is asked for"),
    ],
)
def test_weights_that_do_not_fit(init: dict[str, Any], sentence: str, pretraining: Path, tmp_path: Path) -> None:
    model = tiny.model(**{field: init.pop(field) for field in ("width", "heads") if field in init})
    config = dataclasses.replace(fine_tuning(init.pop("path", pretraining), **init), model=model)
    with pytest.raises(ValueError, match=sentence):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="has no classifier of 7 classes to keep"):
        initial.start_of(fine_tuning(pretraining, keep_head=True), 7)


# ---- The best checkpoint


def test_the_best_evaluation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the last one; and a run that goes on knows which it was."""
    config = tiny.config(4)
    config.checkpoint = c.CheckpointConfig(every=c.Duration(2), best="validation/accuracy")
    config.evaluation.every = c.Duration(1)
    scores = iter([0.9, 0.3, 0.6, 0.5, 0.6])  # that of the start does not count
    measure = loop.Suite.measure
    monkeypatch.setattr(loop.Suite, "measure", lambda *a, **k: measure(*a, **k) | {"validation/accuracy": next(scores)})
    loop.train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (record["step"], record["value"], record["metric"]) == (2, 0.6, "validation/accuracy")
    assert checkpoint.steps(tmp_path / "run" / "best") == [2]
    kept = state_of(config, Path(record["checkpoint"]))
    assert int(kept.step) == 2
    again = checkpoint.Best(tmp_path / "run", "validation/accuracy", record["measured_on"])
    assert (again.value, again.step) == (0.6, 2)
    again.offer(5, kept, {"validation/accuracy": 0.6})
    assert checkpoint.steps(tmp_path / "run" / "best") == [2]
    again.offer(6, kept, {"validation/accuracy": 0.7})
    assert checkpoint.steps(tmp_path / "run" / "best") == [6]


def test_a_misspelt_metric_stops_a_run_before_it_has_a_workdir(tmp_path: Path) -> None:
    config = tiny.config(4)
    config.checkpoint.best = "validation/acuracy"
    with pytest.raises(ValueError, match=r"checkpoint.best is .validation/acuracy.; evaluations measure .*accuracy"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- Learning rates by layer


def abstract(config: Any) -> dict[str, Any]:
    build = lambda: models.build(config, image_size=(28, 28), num_classes=3, key=jax.random.key(0))  # noqa: E731
    return models.split(jax.eval_shape(build))[1]


def test_layer_rates_of_a_vit() -> None:
    rates = chain.layer_rates(abstract(tiny.model(depth=3, layerscale=0.1)), 0.5)
    assert rates["embedding/kernel"] == rates["position_embedding"] == 0.5**4
    assert rates["blocks/mlp/up/kernel"].shape == (3, 1, 1)
    np.testing.assert_allclose(rates["blocks/mlp/up/kernel"].reshape(-1), [0.5**3, 0.5**2, 0.5])
    assert rates["blocks/layerscale1"].shape == (3, 1)
    assert rates["norm/scale"] == rates["pool/probe"] == rates["head/kernel"] == 1


def test_layer_rates_of_a_swin() -> None:
    config = swin.SwinConfig(version=2, width=8, depths=(4, 2), heads=(1, 2), window=4, extra_norm_every=2)
    rates = chain.layer_rates(abstract(config), 0.5)
    plain, shifted = ("stage1/blocks/plain/norm1/scale", "stage1/blocks/shifted/norm1/scale")
    np.testing.assert_allclose(rates[plain].reshape(-1), [0.5**6, 0.5**4])
    np.testing.assert_allclose(rates[shifted].reshape(-1), [0.5**5, 0.5**3])
    np.testing.assert_allclose(rates["stage2/blocks/plain/norm1/scale"].reshape(-1), [0.5**2])
    np.testing.assert_allclose(rates["stage2/blocks/shifted/norm1/scale"].reshape(-1), [0.5])
    assert rates["stage1/merging/norm/scale"] == 0.5**3
    assert rates["embedding_norm/scale"] == 0.5**7
    with pytest.raises(ValueError, match=r"the parameter 'stem/kernel' belongs to no layer"):
        chain.layer_rates({"stem": {"kernel": np.zeros(2)}}, 0.5)
    with pytest.raises(ValueError, match=r"optim.layer_decay is 0"):
        chain.create(c.OptimConfig(layer_decay=0.0), abstract(config))


def test_layer_decay_scales_the_direction_and_its_decay() -> None:
    shapes = names.unflatten(
        {
            path: jax.ShapeDtypeStruct(shape, jnp.float32)
            for path, shape in (
                ("embedding/kernel", (2, 3)),
                ("blocks/mlp/up/kernel", (3, 2, 2)),
                ("head/kernel", (2, 2)),
                ("head/bias", (2,)),
            )
        }
    )
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), shapes)

    def direction(**fields: Any) -> dict[str, np.ndarray]:
        optimizer = chain.create(c.OptimConfig(name="sgd", clip=None, moment_dtype="float32", **fields), shapes)
        return flat(optimizer.update(grads, optimizer.init(params), params)[0])

    plain, decayed = direction(), direction(layer_decay=0.5)
    rates = chain.layer_rates(shapes, 0.5)
    for path, leaf in decayed.items():
        np.testing.assert_allclose(leaf, plain[path] * rates[path], rtol=1e-6, err_msg=path)
    assert decayed["blocks/mlp/up/kernel"][0, 0, 0] == pytest.approx(0.125 * (2 + 0.03))
    rows = {row.path: row.rates for row in chain.describe(c.OptimConfig(layer_decay=0.5), shapes)}
    assert rows == {
        "embedding/kernel": (0.0625, 0.0625),
        "blocks/mlp/up/kernel": (0.125, 0.5),
        "head/kernel": (1.0, 1.0),
        "head/bias": (1.0, 1.0),
    }
    frozen = direction(layer_decay=0.5, freeze=(r"(?!head/).*",))
    assert {path for path, leaf in frozen.items() if leaf.any()} == {"head/kernel", "head/bias"}


# ---- Configs


def test_the_configs_say_the_published_recipe(pretraining: Path) -> None:
    config = finetune.get_config("B/16,cifar10")
    assert (config.optim.name, config.optim.beta1, config.optim.clip, config.data.batch_size) == ("sgd", 0.9, 1.0, 512)
    assert (config.optim.weight_decay, config.optim.head_weight_decay) == (0.0, 0.0)
    assert (config.schedule.kind, config.schedule.warmup.amount) == ("cosine", 500)
    assert (config.data.transform.size, config.data.transform.resize_to) == ((384, 384), 448)
    assert (config.data.train.split, config.evaluation.validation.split) == ("train[:98%]", "train[98%:]")
    flat_lr = finetune.get_config("g/14,imagenet,res=518,flat")
    assert (flat_lr.schedule.kind, flat_lr.optim.ema, flat_lr.data.transform.size) == ("constant", 0.9999, (518, 518))
    own = finetune.get_config(f"{pretraining},digits,res=42x56,probe")
    assert own.model == dataclasses.replace(tiny.model(), drop_path=0.0)
    assert (own.init.path, own.data.transform.size) == (str(pretraining), (42, 56))
    assert [row.path for row in chain.describe(own.optim, abstract(own.model)) if not row.frozen] == [
        "head/bias",
        "head/kernel",
    ]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("B/16", "write finetune.py:MODEL,DATA with DATA a folder or one of imagenet, cifar10"),
        ("B/16,digits,res=1x2x3", "res is '1x2x3'; write 384"),
        ("B/16,digits,fast", "takes no 'fast'"),
        ("B/16,digits,crop=none", "crop is 'none'; choose one of random, inception"),
        ("nowhere/vit,digits", "no ViT size is called 'nowhere'"),
    ],
)
def test_arguments_that_cannot_work(argument: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        finetune.get_config(argument)


def test_the_sweep_ends_with_a_table_of_the_best(tmp_path: Path) -> None:
    sweep_config = transfer_sweep.get_config("B/16,cifar10,smoke")
    assert dict(transfer_sweep.get_config("B/16,cifar10").fields)["optim.lr"] == (0.001, 0.003, 0.01, 0.03)
    jobs = grid.plan(sweep_config)
    assert [job.config.optim.lr for job in jobs] == [0.01, 0.03]
    assert grid.table(sweep_config, jobs, tmp_path).count("\n") == 2
    for job, accuracy in zip(jobs, (0.25, 0.5), strict=True):
        folder = runner.folder(tmp_path, job.name)
        workdirs.claim(folder, c.resolve(job.config, 4000))
        metrics = {"validation/accuracy": accuracy, "test/accuracy": 0.3}
        (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
    rows = [line.strip("| ").split(" | ") for line in grid.table(sweep_config, jobs, tmp_path).splitlines()]
    assert rows[0][:4] == ["run", "optim.lr", "data.transform.crop", "validation/accuracy"]
    assert "test/accuracy" in rows[0]
    assert [row[:4] for row in rows[2:]] == [
        ["run001", "0.03", "random", "0.5000"],
        ["run000", "0.01", "random", "0.2500"],
    ]
    shown = grid.summary(sweep_config, jobs, tmp_path).splitlines()
    assert shown[0] == "2 of 2 runs have finished; the best by validation/accuracy:"
    assert shown[1].split()[:3] == ["run001", "50.00%", "optim.lr=0.03,"]
    assert max(map(len, shown)) <= 80
    with pytest.raises(ValueError, match="metric is 'x', but runs measured"):
        grid.table(dataclasses.replace(sweep_config, metric="x"), jobs, tmp_path)
    with pytest.raises(ValueError, match=r"a study's config has no field 'optim.rate'"):
        grid.plan(dataclasses.replace(sweep_config, fields=(("optim.rate", (1,)),)))
