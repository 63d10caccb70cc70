"""Weights through real files, both ways, against transformers and timm running beside us.

    pip install -e ".[benchmark]" && pip install --no-deps timm
    python benchmarks/interop.py

The reference saves a network of random weights away from their initial values, this package reads the file; this
package writes a network, the reference reads it. Printed: the largest difference of the logits, float32.
"""

import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import fill  # noqa: E402
import reference  # noqa: E402

from vit_scaling import interop, models  # noqa: E402
from vit_scaling.models import swin, vit  # noqa: E402

LIMIT = 2e-5
# What transformers calls it, its fields, and the size of the images.
THEIRS = (
    ("ViT", {}, (224, 224)),
    ("ViT", {"patch_size": 32, "image_size": (224, 320)}, (224, 320)),
    ("ViT", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "qkv_bias": False}, (224, 224)),
    ("Swin", {}, (224, 224)),
    ("Swin", {"image_size": (224, 300), "depths": [2, 2, 2, 2], "use_absolute_embeddings": True}, (224, 300)),
    ("Swinv2", {"image_size": 256, "window_size": 8}, (256, 256)),
    ("Swinv2", {"image_size": 192, "window_size": 12, "pretrained_window_sizes": [8, 8, 8, 6]}, (192, 192)),
)
OURS = (
    ("huggingface", vit.variant("Ti/16", pool="token", gelu="exact", norm_eps=1e-12), (224, 224)),
    ("huggingface", vit.variant("S/32", pool="token", gelu="tanh"), (256, 320)),
    ("huggingface", vit.variant("Ti/16", pool="gap", position="sincos2d"), (224, 224)),
    ("huggingface", swin.variant("T"), (224, 224)),
    ("huggingface", swin.variant("v2-T"), (256, 256)),
    ("huggingface", swin.variant("v2-T", pretrained_windows=(6, 6, 6, 6)), (192, 320)),
    ("timm", vit.variant("Ti/16", pool="token", gelu="exact"), (224, 320)),
    ("timm", vit.variant("S/16", pool="map", registers=4, layerscale=0.1), (160, 224)),
    ("timm", vit.variant("So150m/14", pool="gap"), (224, 224)),
    ("timm", swin.variant("T"), (224, 224)),
    ("timm", swin.variant("v2-T"), (256, 256)),
)


def noise_(model):
    """Weights away from where they start: norms, biases and tables that are 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.02 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(size):
    return fill.images("live", (2, *size, 3))


def run_theirs(model, size):
    with torch.no_grad():
        result = model(torch.tensor(images(size)).permute(0, 3, 1, 2))
    return (result if isinstance(result, torch.Tensor) else result.logits).numpy()


def run_ours(model, size):
    description, *arrays = models.split(model)
    return np.asarray(jax.jit(lambda a, x: models.merge(description, *a)(x))(arrays, jnp.asarray(images(size))))


def read_theirs(name, fields, size, folder):
    config = getattr(transformers, f"{name}Config")(num_labels=100, **fields)
    model = noise_(getattr(transformers, f"{name}ForImageClassification")(config))
    model.save_pretrained(folder)
    return run_theirs(model, size), run_ours(interop.load(folder), size)


def read_official(folder):
    """A .pth file as the official code writes it, read by torch's loader of weights alone."""
    model = noise_(reference.timm().create_model("swin_tiny_patch4_window7_224", num_classes=100))
    named = {
        name.replace("head.fc", "head").replace(f"layers.{s + 1}.downsample", f"layers.{s}.downsample"): value
        for name, value in model.state_dict().items()
        for s in [int(name.split(".")[1]) - 1 if "downsample" in name else 0]
    }
    torch.save({"model": named}, folder / "swin.pth")
    return run_theirs(model, (224, 224)), run_ours(interop.load(folder / "swin.pth"), (224, 224))


def write_ours(layout, config, size, folder):
    build = lambda: models.build(config, image_size=size, num_classes=100, key=jax.random.key(0))  # noqa: E731
    description, parameters, _ = models.split(jax.eval_shape(build))
    model = models.merge(description, jax.tree.map(jnp.asarray, fill.tree(parameters)), {})
    interop.save(model, folder / "export", layout=layout)
    if layout == "timm":
        theirs = reference.timm().create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    else:
        load = transformers.AutoModelForImageClassification.from_pretrained
        theirs, report = load(folder / "export", output_loading_info=True)
        assert not any(report.values()), report
        theirs.eval()
    return run_theirs(theirs, size), run_ours(model, size)


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worst = 0.0

    def report(what, pair):
        nonlocal worst
        theirs, ours = pair
        difference = float(np.abs(theirs - ours).max())
        worst = max(worst, difference)
        print(f"{what:70s} {difference:.1e}  (logits' deviation {theirs.std():.2f})", flush=True)

    for name, fields, size in THEIRS:
        with tempfile.TemporaryDirectory() as folder:
            title = f"read {name} {size[0]}x{size[1]} {' '.join(fields)}"
            report(title, read_theirs(name, fields, size, folder))
    with tempfile.TemporaryDirectory() as folder:
        report("read official Swin-T .pth", read_official(pathlib.Path(folder)))
    for layout, config, size in OURS:
        with tempfile.TemporaryDirectory() as folder:
            kind = f"{type(config).__name__} {getattr(config, 'pool', getattr(config, 'version', ''))}"
            title = f"write {layout} {kind} width {config.width} {size[0]}x{size[1]}"
            report(title, write_ours(layout, config, size, pathlib.Path(folder)))
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
