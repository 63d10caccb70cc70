"""Losses against their definitions, term by term."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling.optim import losses
from vit_scaling.optim.losses import LossConfig

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])


def test_softmax_cross_entropy() -> None:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    one_hot = losses.targets(jnp.array([0, 2], jnp.int32), 3)
    found = losses.loss(LossConfig("softmax"), jnp.float32(LOGITS), one_hot)
    np.testing.assert_allclose(found, [-np.log(p[0, 0]), -np.log(p[1, 2])], rtol=1e-5)
    smooth = losses.loss(LossConfig("softmax", label_smoothing=0.3), jnp.float32(LOGITS), one_hot)
    expected = [-0.7 * np.log(p[i, k]) - 0.1 * np.log(p[i]).sum() for i, k in enumerate([0, 2])]
    np.testing.assert_allclose(smooth, expected, rtol=1e-5)


def test_softmax_of_several_labels_is_their_mean() -> None:
    multi_hot = jnp.float32([[1, 0, 1], [0, 1, 0]])
    found = losses.loss(LossConfig("softmax"), jnp.float32(LOGITS), losses.targets(multi_hot, 3))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, [-np.log(p[0, [0, 2]]).mean(), -np.log(p[1, 1])], rtol=1e-5)


def test_sigmoid_cross_entropy_is_summed_over_classes() -> None:
    p = 1 / (1 + np.exp(-LOGITS))
    multi_hot = np.array([[1, 0, 1], [0, 1, 0]])
    expected = -(multi_hot * np.log(p) + (1 - multi_hot) * np.log(1 - p)).sum(-1)
    found = losses.loss(LossConfig("sigmoid"), jnp.float32(LOGITS), jnp.float32(multi_hot))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_head_bias_of_minus_ten_starts_the_sigmoid_loss_low() -> None:
    # 1,000 classes at -10: the one label costs 10, all others almost nothing.
    logits = jnp.full((1, 1000), -10.0)
    found = losses.loss(LossConfig("sigmoid"), logits, losses.targets(jnp.array([3], jnp.int32), 1000))
    assert float(found[0]) == pytest.approx(10 + 1000 * np.log1p(np.exp(-10)), rel=1e-4)


def test_extreme_logits_stay_finite() -> None:
    logits = jnp.float32([[1e4, -1e4]])
    for kind in losses.KINDS:
        assert np.isfinite(losses.loss(LossConfig(kind), logits, jnp.float32([[0.0, 1.0]]))).all()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LossConfig("hinge"), "loss.kind is 'hinge'; choose one of softmax, sigmoid"),
        (LossConfig("softmax", label_smoothing=1.0), "loss.label_smoothing is 1.0"),
        (LossConfig("sigmoid", label_smoothing=0.1), "no meaning for the sigmoid loss"),
        (LossConfig("sigmoid", head_bias=float("inf")), "loss.head_bias is inf; it must be a finite number"),
    ],
)
def test_losses_that_do_not_exist(config: LossConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        losses.check(config)
