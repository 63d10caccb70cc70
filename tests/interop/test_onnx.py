"""An ONNX file of a plain ViT is read as the network that onnxruntime runs; damaged ones are refused."""

import pathlib

import numpy as np
import pytest

from tests.golden import fill
from tests.interop.test_interop import outputs
from vit_scaling import interop
from vit_scaling.interop import onnx

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RESULTS = np.load(GOLDEN / "onnx.npz")
SIZE = (24, 32)


def test_a_backbone_with_resampled_positions() -> None:
    """The legacy exporter of torch lost the names of every kernel and cut the position table in two."""
    path = GOLDEN / "onnx" / "dinov2.onnx"
    weights = interop.read(path)
    config = weights.config
    assert (weights.num_classes, weights.family) == (0, "DINOv2")
    assert (config.heads, config.gelu, config.norm_eps, config.layerscale) == (4, "exact", 1e-6, 1.0)
    assert weights.image_size == SIZE
    assert weights.normalisation is not None
    assert weights.normalisation.mean == (0.485, 0.456, 0.406)
    actual = outputs(weights.module(), fill.images("onnx", (2, *SIZE, 3)), "encode")
    np.testing.assert_allclose(actual, RESULTS["dinov2"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "vit_dynamo"])
def test_a_classifier_of_both_exporters(name: str) -> None:
    weights = interop.read(GOLDEN / "onnx" / f"{name}.onnx", interop.Target(trained_size=SIZE))
    assert (weights.config.heads, weights.config.gelu, weights.image_size) == (2, "exact", SIZE)
    actual = outputs(weights.module(), fill.images("onnx", (2, *SIZE, 3)))
    np.testing.assert_allclose(actual, RESULTS[name], atol=2e-5, rtol=0)


def test_damaged_files_are_refused(tmp_path: pathlib.Path) -> None:
    """Every cut, and every byte of the structure turned into its opposite: the same network, or one sentence."""
    whole = (GOLDEN / "onnx" / "vit.onnx").read_bytes()
    path = tmp_path / "x.onnx"
    generator = np.random.default_rng(0)
    refused = 0
    for step in range(80):
        damaged = bytearray(whole)
        if step % 2:
            del damaged[generator.integers(len(whole)) :]
        else:
            damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        sentence = ""
        try:
            tensors, _ = onnx.open_onnx(path)
            for tensor in tensors.values():
                tensor.read()
        except ValueError as error:
            sentence = str(error)
            refused += 1
        assert not sentence or ("x.onnx" in sentence and "\n" not in sentence), sentence
    assert refused > 40


def test_a_file_of_endless_nodes_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes make a node: without a limit a file of 100 MB would become 50 million objects."""
    monkeypatch.setattr(onnx, "MAX_PARTS", 50)
    nodes = b"\x0a\x00" * 60
    (tmp_path / "x.onnx").write_bytes(b"\x3a" + bytes([len(nodes)]) + nodes)
    with pytest.raises(ValueError, match=r"x\.onnx has more than 50 nodes and tensors"):
        onnx.open_onnx(tmp_path / "x.onnx")
