"""What claims measure of a run's weights: heads, pruning, replaced convolutions, activations, other windows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import claims as claims_file
from vit_scaling import config as c
from vit_scaling import interop, models
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models.attention_cnn import AttentionCNNConfig
from vit_scaling.models.resnet import ResNetConfig
from vit_scaling.models.swin import SwinConfig
from vit_scaling.studies import measures


def run(folder: Path, model_config, edit=None, seed: int = 0) -> c.Config:
    """Leaves weights as a run does, and returns the config of a run on 100 digits."""
    config = claims_file.get_config("pool,smoke").claims[0].variants["map"]
    config = dataclasses.replace(config, model=model_config)
    config.evaluation = dataclasses.replace(
        config.evaluation, test=SourceConfig("builtin", "mnist", "test[:100]"), batch_size=40
    )
    size = config.data.transform.size
    model = models.build(model_config, image_size=size, num_classes=10, key=jax.random.key(seed))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
    if edit is not None:
        edit(model)
    interop.save(model, folder, layout="vit_scaling")
    return config


def cnn(position: str) -> AttentionCNNConfig:
    return AttentionCNNConfig(position=position, width=16, depth=3, heads=4, mlp=16)


def test_heads_are_measured_against_the_grid_of_shifts(tmp_path):
    """Four heads on whole shifts in layer 1, two of them on one; in layer 2 all in the middle between four."""

    def edit(model):
        centers = np.zeros((3, 4, 2), np.float32)
        centers[0] = [[0, 1], [0, 1], [-3, 2], [1, 0]]
        centers[1] = [0.5, -0.5]
        model.blocks.attention.centers[...] = jnp.asarray(centers)
        model.blocks.attention.spreads[...] = jnp.full((3, 4), 20.0)

    found = measures.heads(tmp_path / "run", run(tmp_path / "run", cnn("quadratic"), edit))
    assert found["heads/off_grid"] == pytest.approx(0.5**0.5 / 2)
    assert found["heads/one_token"] == pytest.approx((1 + 0.25) / 2)
    assert found["heads/shifts"] == (3 + 1) / 2


@pytest.mark.parametrize("silent", [True, False])
def test_a_singular_head_is_pruned_and_its_effect_measured(tmp_path, silent):
    def edit(model):
        model.blocks.attention.spreads[...] = jnp.broadcast_to(jnp.eye(2), (3, 4, 2, 2)).at[1, 2, 0, 0].set(1e-4)
        kernel = model.blocks.attention.out.kernel[...]  # [Z, N, D, E]
        model.blocks.attention.out.kernel[...] = kernel.at[1, 2].set(0.0 if silent else 30 * kernel[1, 2])

    found = measures.pruned(tmp_path / "run", run(tmp_path / "run", cnn("gaussian"), edit))
    assert found["pruned/heads"] == 1
    assert (found["pruned/accuracy_change"] == 0) == silent


def test_round_heads_are_never_pruned(tmp_path):
    found = measures.pruned(tmp_path / "run", run(tmp_path / "run", cnn("quadratic")))
    assert found == {"pruned/heads": 0, "pruned/accuracy_change": 0}


def test_replaced_convolutions_keep_every_prediction(tmp_path, monkeypatch):
    config = run(tmp_path / "run", ResNetConfig(depth=14, width=4, stem="small"))
    found = measures.replaced(tmp_path / "run", config)
    assert found["replaced/layers"] == 5
    assert found["replaced/changed"] == 0
    assert 0 < found["replaced/logit"] < 1e-4
    monkeypatch.setattr(measures, "SHARP", 0.1)  # heads that look at many pixels are no convolution
    assert measures.replaced(tmp_path / "run", config)["replaced/changed"] > 0.05


def test_activations_are_those_between_the_pairs_of_a_stage(tmp_path):
    shape = SwinConfig(width=8, depths=(4, 2), heads=(2, 2), window=4, drop_path=0.0)
    config = run(tmp_path / "run", shape)
    found = measures.activations(tmp_path / "run", config)["activations/growth"]
    # The same weights with the second pair of blocks taken away, in a network that ends there.
    whole = interop.read(tmp_path / "run")
    images_BHWC = jnp.asarray(next(measures._test_images(config))[0], jnp.float32) / 127.5 - 1

    def after(pairs: int) -> float:
        module = whole.module()
        module.stage1.blocks = jax.tree.map(lambda leaf: leaf[:pairs], module.stage1.blocks)
        trunk = jax.jit(lambda x_BHWD: module.stage1.trunk(x_BHWD, jnp.zeros((pairs, 2)), None)[0])
        return float(jnp.std(trunk(jax.jit(module.tokens)(images_BHWC))))

    assert found == pytest.approx(after(2) / after(1), rel=1e-4)
    assert found > 1.00001
    config = run(tmp_path / "second", dataclasses.replace(shape, version=2))
    # The norms of V2's branches start at zero: every block is the identity.
    assert measures.activations(tmp_path / "second", config)["activations/growth"] == 1


@pytest.mark.parametrize("version", [1, 2])
def test_another_window_is_used_without_training(tmp_path, version):
    def edit(model):
        if version == 1:
            table = model.stage1.blocks.plain.attention.relative_position_bias_table
            table[...] = 30 * jax.random.normal(jax.random.key(2), table.shape)

    shape = SwinConfig(version=version, width=8, depths=(2, 2), heads=(2, 2), window=2, drop_path=0.0)
    config = run(tmp_path / "run", shape, edit)
    assert measures.other_window(tmp_path / "run", config, window=2) == {"window/accuracy_change": 0}
    weights = interop.read(tmp_path / "run")
    fields = {"window": 7} | ({"pretrained_windows": (2, 2)} if version == 2 else {})
    target = dataclasses.replace(weights.config, **fields)
    expected = measures._accuracy(weights.adapted(interop.Target(config=target)), config)
    found = measures.other_window(tmp_path / "run", config, window=7)["window/accuracy_change"]
    assert found == pytest.approx(expected - measures._accuracy(weights, config))
