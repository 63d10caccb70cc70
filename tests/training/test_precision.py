"""Matrix products and convolutions are computed in the dtype that the config states."""

import dataclasses
import re

import jax
import pytest

from tests import tiny
from vit_scaling import cli
from vit_scaling.config import resolve
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import step

PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution)")


def products(config):
    """Returns the lines of the lowered training step that multiply float32 arrays."""
    mesh = mesh_lib.create(config.mesh, jax.devices()[:1])
    program = step.build(config, num_classes=10, total_steps=int(config.duration.amount), mesh=mesh)
    text = program.train_step.lower(program.state_shape, step.batch_shape(config, 10, False, mesh)).as_text()
    return [line for line in text.splitlines() if PRODUCT.search(line) and "xf32>, tensor<" in line]


def of_family(name):
    config = resolve(cli.load_config(f"configs/{name}.py:smoke"), 1000)
    return dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))


@pytest.mark.parametrize("name", ["vit_imagenet", "swin_digits", "sasa_imagenet", "attention_cnn_digits"])
def test_float32_means_float32_on_every_platform(name):
    config = of_family(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    lines = products(config)
    assert lines
    assert all("HIGHEST" in line for line in lines)


def test_bfloat16_leaves_the_choice_to_the_platform():
    config = tiny.config(model=tiny.model(dtype="bfloat16"))
    assert not any("HIGHEST" in line for line in products(config))
