"""Every config: its smoke trains two steps by the real loop, and its whole size can be traced."""

import dataclasses
import gzip
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from vit_scaling import cli
from vit_scaling import config as c
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import identity, loop, telemetry
from vit_scaling.training import workdir as workdirs
from vit_scaling.training.step import batch_shape, build

CONFIGS = Path(__file__).parent.parent / "configs"

# The variants of each experiment; a config that is not named here fails a test below.
VARIANTS: dict[str, tuple[str, ...]] = {
    "smoke": ("",),
    "vit_imagenet": ("S/16", "B/16"),
    "vit_imagenet21k": ("B/16", "L/16"),
    "vit_jft": ("g/14", "G/14"),
    "vit_fashion_mnist": ("", "tfds"),
    "swin_imagenet": ("T", "v2-B"),
    "swin_digits": ("v2", "v1"),
    "resnet_imagenet": ("50", "26"),
    "sasa_imagenet": ("50,stem=attention", "26"),
    "aa_resnet_imagenet": ("101", "50"),
    "finetune": ("B/16,cifar10", "L/14,imagenet,res=518,flat", "S/16,pets,res=256x384,crop=inception,probe"),
    "own_images": ("builtin:mnist,model=mu/7,res=28",),
    "attention_cnn_cifar10": ("learned+content", "quadratic", "gaussian"),
    "attention_cnn_digits": ("gaussian", "quadratic"),
    "deit3_imagenet": ("S", "B", "H-finish"),
    "distill_digits": ("tests/files/checkpoint_before",),  # the teacher
}
# Studies are no experiments of their own: tests/studies and tests/test_finetune.py have them.
STUDIES = {"claims", "study", "transfer_sweep", "fashion_study"}

WHOLE = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def load(name: str, argument: str) -> c.Config:
    return cli.load_config(f"{name}:{argument}")


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("[!_]*.py")} - STUDIES == set(VARIANTS)


def test_every_config_is_importable_and_gives_its_command() -> None:
    for name in (*VARIANTS, *STUDIES):
        module = importlib.import_module(f"configs.{name}")
        assert module.__doc__
        assert re.search(r"(\./run\.sh |python -m vit_scaling\.)(train|study) --config=configs/", module.__doc__), name
        assert dataclasses.is_dataclass(module.get_config())


def test_a_student_of_the_digits_has_a_teacher_or_the_labels() -> None:
    assert load("distill_digits", "runs/other").loss.teacher == "runs/other"
    assert load("distill_digits", "labels").loss.teacher is None


# ---- golden configs: every field of every resolved config ------------------------------------------------------------

GOLDEN = Path(__file__).parent / "files" / "configs"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.lr": 0.001, ...} of nested dicts."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}


def resolved(name: str) -> dict[str, dict[str, Any]]:
    """Returns what tests/files/configs/NAME.json holds: the first variant's fields, and how the others differ from it.

    Durations are in steps: of ImageNet's 1,281,167 images, and of 4,000 digits where the config is shrunk to `smoke`.
    """
    base: dict[str, Any] = {}
    found = {}
    for variant in VARIANTS[name]:
        for argument, examples in ((variant, 1_281_167), (f"{variant},smoke", 4_000)):
            fields = flat(c.to_dict(c.resolve(load(name, argument), examples)))
            found[argument] = {key: value for key, value in fields.items() if not base or base.get(key, "") != value}
            found[argument] |= dict.fromkeys(base.keys() - fields.keys(), "absent")
            base = base or fields
    return found


def text_of(name: str) -> str:
    ordered = {argument: dict(sorted(fields.items())) for argument, fields in resolved(name).items()}
    return json.dumps(ordered, indent=1) + "\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_resolved_configs_are_golden(name: str) -> None:
    """No field of any experiment changes unnoticed. Meant to change? `.venv/bin/python -m tests.test_configs`."""
    assert (GOLDEN / f"{name}.json").read_text() == text_of(name)


# What config.json of runs held on 2026-11-26, before fields that came later. Never made again.
BEFORE = json.loads(gzip.decompress((GOLDEN.parent / "configs_before.json.gz").read_bytes()))


@pytest.mark.parametrize("name", BEFORE)
def test_a_run_from_before_continues(name: str) -> None:
    ((argument, old),) = BEFORE[name].items()
    assert identity.differences(old, json.loads(text_of(name))[argument]) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_smoke_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = VARIANTS[name][0]
    config = load(name, f"{variant},smoke" if variant else "smoke")
    create = mesh_lib.create
    monkeypatch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
    # Programs that run twice: a third of the test is saved by not optimizing them.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    monkeypatch.setattr(mesh_lib, "compiler_options", lambda mesh: fast)
    config = dataclasses.replace(config, duration=c.Duration(2))
    result = loop.train(config, tmp_path / "run")
    assert result["step"] == 2
    rows = [row for row in telemetry.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] is not None and row["gradient_norm"] > 0 for row in rows)


@pytest.mark.parametrize(("name", "variant"), WHOLE)
def test_the_whole_experiment_can_be_traced(name: str, variant: str) -> None:
    """Shapes only: no parameter is made, no data read."""
    config = c.resolve(load(name, variant), 1_281_167)
    # One device in each position of the mesh is enough for shapes; the batch stays the config's own.
    mesh = mesh_lib.create(config.mesh, jax.devices()[:1])
    classes = 10 if config.loss.teacher else 1000  # as many as the teacher's
    program = build(config, num_classes=classes, total_steps=int(config.duration.amount), mesh=mesh)
    shapes: Any = batch_shape(config, classes, False, mesh)
    lines = workdirs._parameter_table(config, program)
    assert max(map(len, lines)) <= 80
    assert len(lines) >= 2 + len(jax.tree.leaves(program.state_shape.params))
    state, metrics = jax.eval_shape(program.train_step, program.state_shape, shapes)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.state_shape)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert metrics["loss"].shape == ()


def test_configs_say_the_published_recipes() -> None:
    jft = load("vit_jft", "G/14")
    assert (jft.data.batch_size, jft.optim.lr, jft.optim.weight_decay, jft.optim.head_weight_decay) == (
        32_768,
        8e-4,
        0.03,
        3.0,
    )
    assert (jft.loss.kind, jft.loss.head_bias, jft.model.pool, jft.model.depth) == ("sigmoid", -10.0, "map", 48)
    plain = load("vit_imagenet", "S/16")
    assert (plain.optim.name, plain.optim.lr, plain.optim.weight_decay) == ("adam", 1e-3, 0.1)
    assert (plain.model.pool, plain.model.position, plain.schedule.kind) == ("gap", "sincos2d", "cosine")


def test_arguments() -> None:
    assert c.arguments("S/16,smoke", variants=None) == c.Arguments("S/16", True)
    assert c.arguments("", variants=(), default="") == c.Arguments("", False)
    assert c.arguments("smoke", variants=("a",), default="a") == c.Arguments("a", True)
    with pytest.raises(ValueError, match="no variant 'b'; choose one of a"):
        c.arguments("b", variants=("a",))


def test_differences_name_the_fields() -> None:
    config = load("smoke", "")
    other = dataclasses.replace(config, seed=1, mesh=c.MeshConfig(data=2), log=c.LogConfig(stop_after_skipped=1))
    assert identity.differences(c.to_dict(config), c.to_dict(other)) == ["seed is 0 there and 1 here"]
    assert identity.differences(c.to_dict(config), c.to_dict(config)) == []
    # A run of before a field existed is one in which it was off.
    older = {name: value for name, value in c.to_dict(config).items() if name != "init"}
    older["model"] = {name: value for name, value in older["model"].items() if name not in ("mean", "std")}
    assert identity.differences(older, c.to_dict(config)) == []
    started = dataclasses.replace(config, init=c.InitConfig(path="weights"))
    assert identity.differences(older, c.to_dict(started)) == ["init.path is None there and 'weights' here"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"duration": c.Duration(0)}, "duration is 0 steps; it must be at least 1 step"),
        ({"duration": c.Duration(1, "weeks")}, "duration: unit is 'weeks'"),
        ({"checkpoint": c.CheckpointConfig(every=c.Duration(0))}, "checkpoint.every is 0 steps"),
        ({"checkpoint": c.CheckpointConfig(every=c.Duration(1), keep=0)}, "checkpoint.keep is 0"),
        ({"log": c.LogConfig(stop_after_skipped=0)}, "log.stop_after_skipped is 0"),
        ({"loss": c.LossConfig(kind="hinge")}, "loss.kind is 'hinge'"),
    ],
)
def test_configs_that_cannot_work(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        c.resolve(dataclasses.replace(load("smoke", ""), **change), 4000)
    with pytest.raises(ValueError, match="batch_size 100 is larger than the training set of 50"):
        c.resolve(load("smoke", ""), 50)


def test_durations_become_steps() -> None:
    config = c.resolve(load("smoke", ""), 4000)
    assert config.duration.unit == "steps"
    assert config.duration.amount == load("smoke", "").duration.amount * 40
    assert config.evaluation.every.unit == config.schedule.cooldown.unit == "steps"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in VARIANTS:
        (GOLDEN / f"{each}.json").write_text(text_of(each))
