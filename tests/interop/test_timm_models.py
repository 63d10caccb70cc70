"""Every vision transformer that timm registers is read as itself or refused by its name, never as another network."""

import functools
import gzip
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from vit_scaling import UserError, models, names
from vit_scaling.interop import convert, reading, timm_models
from vit_scaling.interop.stored import Stored
from vit_scaling.interop.weights import abstract
from vit_scaling.models import swin, vit

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "timm_models.json.gz"


@functools.cache
def records() -> dict[str, Any]:
    return json.loads(gzip.decompress(GOLDEN.read_bytes()))


def tensors(record: dict[str, Any]) -> dict[str, Stored]:
    """Returns the file's names and shapes; nothing can be read."""
    stored = {}
    for key, layers in record["tensors"].items():
        pattern, shape = re.fullmatch(r"(\S+) (\[.*\])", key).groups()
        for layer in layers:
            numbers = iter(layer.split("."))
            name = re.sub("#", lambda _: next(numbers), pattern)  # noqa: B023
            stored[name] = Stored(tuple(json.loads(shape)), "float32", lambda: np.zeros(0))
    return stored


def described(name: str, bare: bool) -> Any:
    """Returns the description of a hub-shaped folder; bare: of an older one, which lists no arguments."""
    record = records()[name]
    config = {key: value for key, value in record["config"].items() if not (bare and key == "model_args")}
    family, named, result = reading.describe_tensors(tensors(record), config, None)
    like = names.flatten(models.split(abstract(result.config, result.image_size, result.num_classes or 0))[1])
    shapes = {path: leaf.shape for path, leaf in convert.unstack(like).items()}
    shapes = {path: shape for path, shape in shapes.items() if result.num_classes or not path.startswith("head/")}
    expected = {entry.theirs for entry in convert.entries(family, shapes, result.prefix)}
    left = {key for key in named if not any(re.fullmatch(pattern, key) for pattern in family.ignored)}
    assert expected == left, f"{name}: {sorted(expected ^ left)[:4]}"
    return result


def check_vit(config: vit.ViTConfig, facts: dict[str, Any]) -> None:
    pools = {"gap": "avg", "token": "token", "map": "map", "max": "max", "avgmax": "avgmax", "token+register": "token"}
    assert config.heads == facts["heads"]
    assert pools[config.pool] == facts["pool"]
    assert config.pool_prefix == facts["pool_include_prefix"] or config.pool in vit.TOKEN_POOLS
    assert vit.prefix_tokens(config) == facts["prefix"]
    norms = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm"}
    kind, eps = facts["norm"].split()
    assert (config.norm, config.norm_eps) == (norms[kind], float(eps))
    assert config.pre_norm == (facts["pre_norm"] != "Identity")
    assert config.pool_norm == (facts["fc_norm"] != "Identity")
    assert facts["block"] == "Block"
    assert facts["attention"] == "Attention"
    assert facts["embedding"] == "PatchEmbed"
    if config.mlp_kind == "gelu":
        assert facts["mlp"] == "Mlp"
        acts = {"GELU": "exact", "GELU tanh": "tanh", "GELUTanh tanh": "tanh", "QuickGELU": "quick"}
        assert config.gelu == acts[facts["act"]]
    if config.pool == "map":
        assert facts["pool_heads"] == config.heads


def check_swin(result: Any, facts: dict[str, Any]) -> None:
    config = result.config
    assert list(swin.stage_windows(config, result.image_size)) == facts["windows"]
    assert list(config.heads) == facts["heads"]
    assert list(config.pretrained_windows or [0] * len(config.depths)) == facts["pretrained"]
    assert float(facts["norm"].split()[1]) == config.norm_eps
    assert facts["act"] == "GELU"


@pytest.mark.parametrize("bare", [False, True], ids=["with arguments", "name alone"])
def test_no_architecture_is_read_as_another(bare: bool) -> None:
    read, refused = [], []
    for name, record in records().items():
        facts = record["facts"]
        try:
            result = described(name, bare)
        except UserError as error:
            assert name in str(error), f"{name}: {error}"  # noqa: PT017
            refused.append(name)
            continue
        config, pretrained = result.config, record["config"]["pretrained_cfg"]
        assert list(config.patch if isinstance(config, vit.ViTConfig) else [config.patch] * 2)
        assert list(result.image_size) == facts["image_size"], name
        assert list(result.normalisation.mean) == pytest.approx(pretrained["mean"]), name
        assert list(result.normalisation.std) == pytest.approx(pretrained["std"]), name
        check_vit(config, facts) if isinstance(config, vit.ViTConfig) else check_swin(result, facts)
        read.append(name)
    assert len(read) >= 100, (len(read), refused)


def test_other_classes_are_refused_by_name() -> None:
    others = [name for name, entry in timm_models.table().items() if entry[0] not in timm_models.SUPPORTED]
    assert len(others) > 100
    for name in others:
        with pytest.raises(UserError, match=f"this is timm's {re.escape(name)}, a "):
            timm_models.known({"architecture": name, "pretrained_cfg": {}})


@pytest.mark.parametrize("name", ["global_pool", "norm_layer", "act_layer", "final_norm", "something_new"])
def test_arguments_that_change_the_network_are_refused_by_name(name: str) -> None:
    config = records()["vit_base_patch16_224"]["config"]
    record = {**config, "model_args": {**config.get("model_args", {}), name: "unheard of"}}
    named = tensors(records()["vit_base_patch16_224"])
    with pytest.raises(UserError, match=f"timm's vit_base_patch16_224 with {name} 'unheard of'"):
        reading.describe_tensors(named, record, None)
