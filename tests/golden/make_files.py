"""Writes files.npz, what transformers and timm compute with the networks in files.json, and files_tensors.json.

    python -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.23.0 pillow
    reference/bin/pip install --no-deps timm==1.0.31 open_clip_torch==3.3.0
    reference/bin/python tests/golden/make_files.py

The weights follow fill.py by the *reference's* own names, as its files have them. files_tensors.json records these
names with their shapes and the config.json beside them, so that a test can write the same file and read it.
"""

import json
import pathlib
import tempfile

import fill
import numpy as np
import reference
import torch
import transformers
from safetensors.torch import load_file, save_file

FOLDER = pathlib.Path(__file__).parent


CONFIGS = {
    "ViTMAE": "ViTMAE",
    "ViT": "ViT",
    "Swinv2": "Swinv2",
    "Swin": "Swin",
    "SiglipVision": "SiglipVision",
    "Dinov2WithRegisters": "Dinov2WithRegisters",
    "Dinov2": "Dinov2",
    "DINOv3ViT": "DINOv3ViT",
    "DeiT": "DeiT",
    "CLIPVision": "CLIPVision",
}


def build(case):
    fields, classes = case["fields"], case.get("num_classes")
    name = case["model"]
    text = {"vocab_size": 4, "hidden_size": 4, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 4}
    if name in ("SiglipForImageClassification", "CLIPModel"):
        whole = getattr(transformers, f"{name[:4].replace('Sigl', 'Siglip')}Config")(
            vision_config=fields, text_config=text
        )
        whole.num_labels = classes or 2
        return getattr(transformers, name)(whole)
    config = next(config for prefix, config in CONFIGS.items() if name.startswith(prefix))
    labels = {} if classes is None else {"num_labels": classes}
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**fields, **labels))


def filled(tensors):
    return {name: torch.tensor(fill.reference_leaf(name, tuple(value.shape))) for name, value in tensors.items()}


def run_transformers(name, case):
    """Returns (logits, or the pooled features of a model without classifier; shapes by name; config.json)."""
    with tempfile.TemporaryDirectory() as folder:
        build(case).save_pretrained(folder)
        file = pathlib.Path(folder) / "model.safetensors"
        tensors = filled(load_file(file))
        save_file(tensors, file, metadata={"format": "pt"})
        model = getattr(transformers, case["model"]).from_pretrained(folder, attn_implementation="eager").eval()
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    arguments = {"interpolate_pos_encoding": True} if case.get("interpolate") else {}
    with torch.no_grad():
        if case["model"] in ("ViTMAEForPreTraining", "CLIPModel"):
            model = model.vit if "MAE" in case["model"] else model.vision_model
        result = model(images(name, case), **arguments)
    if hasattr(result, "logits"):
        return result.logits, tensors, config
    pooled = getattr(result, "pooler_output", None)
    return result.last_hidden_state[:, 0] if pooled is None else pooled, tensors, config


def run_timm(name, case):
    model = reference.timm().create_model(case["model"], num_classes=case["num_classes"], **case["fields"]).eval()
    tensors = filled(model.state_dict())
    model.load_state_dict(tensors)
    config = {"architecture": case["model"], "num_classes": case["num_classes"], "model_args": case["fields"]}
    with torch.no_grad():
        return model(images(name, case)), tensors, config


def run_open_clip(name, case):
    """The image tower before the projection; the file holds the text tower, too."""
    import open_clip

    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(8, case["fields"], text).eval()
    tensors = filled(model.state_dict())
    model.load_state_dict(tensors)
    model.visual.proj = None
    with torch.no_grad():
        return model.visual(images(name, case)), tensors, None


def images(name, case):
    return torch.tensor(fill.images(name, (2, *case["image_size"], 3))).permute(0, 3, 1, 2)


RUN = {"timm": run_timm, "open_clip": run_open_clip, "transformers": run_transformers}


def main():
    cases = json.loads((FOLDER / "files.json").read_text())
    results, records = {}, {}
    for name, case in cases.items():
        logits, tensors, config = RUN[case["library"]](name, case)
        results[name] = logits.numpy()
        records[name] = {"config": config, "tensors": {key: list(value.shape) for key, value in tensors.items()}}
        print(f"{name}: {results[name].shape}, deviation {results[name].std():.3f}")
    np.savez(FOLDER / "files.npz", **results)
    (FOLDER / "files_tensors.json").write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
