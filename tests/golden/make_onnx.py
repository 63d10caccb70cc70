"""Writes onnx/*.onnx, small networks of transformers and timm as both exporters of torch write them, and onnx.npz,
what onnxruntime computes with them.

    reference/bin/pip install onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2
    reference/bin/python tests/golden/make_onnx.py

`reference` is the environment of make_files.py. The weights follow fill.py by the reference's own names.
"""

import pathlib

import fill
import numpy as np
import onnxruntime
import reference
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
SIZE = (24, 32)


class Tokens(torch.nn.Module):
    """The tokens after the last norm, as a backbone's export gives them."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone(images).last_hidden_state


def dinov2():
    """Trained at 32x32 pixels: the graph resamples the positions to the grid of its input."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    return Tokens(transformers.Dinov2Model(config))


def vit():
    create = reference.timm().models.vision_transformer.VisionTransformer
    return create(img_size=SIZE, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=3)


def main():
    (FOLDER / "onnx").mkdir(exist_ok=True)
    images = torch.tensor(fill.images("onnx", (2, *SIZE, 3))).permute(0, 3, 1, 2)
    results = {}
    for name, model, dynamo in (("dinov2", dinov2(), False), ("vit", vit(), False), ("vit_dynamo", vit(), True)):
        model = model.eval()
        tensors = {key: torch.tensor(fill.reference_leaf(key, tuple(v.shape))) for key, v in model.state_dict().items()}
        model.load_state_dict(tensors)
        path = FOLDER / "onnx" / f"{name}.onnx"
        legacy = {"dynamic_axes": {"images": {0: "batch"}}, "opset_version": 17}
        newer = {"external_data": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        options = newer if dynamo else legacy
        torch.onnx.export(model, (images,), path, input_names=["images"], dynamo=dynamo, **options)
        results[name] = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
        print(f"{name}: {path.stat().st_size} bytes, {results[name].shape}, deviation {results[name].std():.3f}")
    np.savez(FOLDER / "onnx.npz", **results)


if __name__ == "__main__":
    main()
