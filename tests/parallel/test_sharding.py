"""The mesh and the table: every large leaf is split, nothing is split across layers, and mistakes are one sentence."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vit_scaling import models, names
from vit_scaling.models import vit
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig


def mesh(**axes: int) -> jax.sharding.Mesh:
    return mesh_lib.create(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])


def test_shapes_of_meshes() -> None:
    assert mesh_lib.shape(MeshConfig(), 8) == (1, 8, 1, 1)
    assert mesh_lib.shape(MeshConfig(replica=2, data=-1, model=2), 8) == (2, 2, 1, 2)
    assert mesh_lib.shape(MeshConfig(replica=-1, data=4), 8) == (2, 4, 1, 1)
    # What is beyond 128 is folded, whatever the number.
    assert mesh_lib.shape(MeshConfig(), 512) == (1, 128, 4, 1)
    assert mesh_lib.shape(MeshConfig(model=2), 384) == (1, 64, 3, 2)
    assert mesh_lib.shape(MeshConfig(), 96) == (1, 96, 1, 1)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(data=3), "a mesh of replica=1, data=3, model=1 does not fit 8 devices"),
        (MeshConfig(replica=-1, data=-1), "2 axes of -1"),
        (MeshConfig(data=-1, model=16), "does not fit 8 devices"),
        (MeshConfig(data=4), "does not fit 8 devices"),
        (MeshConfig(model=0), "mesh.model is 0"),
    ],
)
def test_meshes_that_cannot_be(config: MeshConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        mesh_lib.shape(config, 8)


CASES = [
    ("blocks/attention/query/kernel", (12, 768, 12, 64), PartitionSpec(None, "data", "model", None)),
    ("blocks/attention/out/kernel", (12, 12, 64, 768), PartitionSpec(None, "model", None, "data")),
    ("blocks/mlp/up/kernel", (12, 768, 3072), PartitionSpec(None, "data", "model")),
    ("blocks/mlp/gate/kernel", (12, 768, 3072), PartitionSpec(None, "data", "model")),
    ("blocks/mlp/gate/bias", (12, 3072), PartitionSpec(None, "model")),
    ("blocks/mlp/down/kernel", (12, 3072, 768), PartitionSpec(None, "model", "data")),
    ("pool/attention/key/kernel", (768, 12, 64), PartitionSpec("data", "model", None)),
    ("head/kernel", (768, 30_000), PartitionSpec("data", "model")),
    ("blocks/attention/query/bias", (12, 12, 64), PartitionSpec(None, "model", None)),
    # No rule: the largest axis that `data` divides, and never the stacked layers, however many.
    ("position_embedding", (196, 768), PartitionSpec(None, "data")),
    ("blocks/norm1/scale", (4096, 768), PartitionSpec(None, "data")),
    ("blocks/norm1/scale", (12, 768), PartitionSpec(None, None)),
    ("embedding/kernel", (14, 14, 3, 1408), PartitionSpec(None, None, None, "data")),
    # Factored moments keep the rank of their parameter, with length one where they were averaged.
    ("opt/row/blocks/mlp/up/kernel", (12, 768, 1), PartitionSpec(None, None, None)),
    ("blocks/attention/relative_position_bias_table", (2, 2209, 48), PartitionSpec(None, None, None)),
    # `data` does not divide the width: it moves to an axis that it divides.
    ("embedding/kernel", (16, 16, 3, 1409), PartitionSpec("data", None, None, None)),
]


@pytest.mark.parametrize(("path", "shape", "spec"), CASES)
def test_the_table(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    assert sharding.partition_spec(path, shape, mesh(replica=1, data=4, model=2)) == spec


FOLDED = [
    # Eight divide the rule's axis: both axes go there.
    ("blocks/mlp/up/kernel", (12, 1024, 4096), PartitionSpec(None, ("data", "fold"), None)),
    # Four do and eight do not: `fold` takes another axis, the heads of a kernel or the hidden units.
    ("blocks/attention/query/kernel", (12, 1028, 6, 70), PartitionSpec(None, "data", None, "fold")),
    ("blocks/attention/query/kernel", (12, 1028, 6, 71), PartitionSpec(None, "data", "fold", None)),
    ("blocks/mlp/up/kernel", (12, 1028, 4098), PartitionSpec(None, "data", "fold")),
    ("head/kernel", (1028, 29_593), PartitionSpec("data", None)),
    # Nothing divides it, but each layer is small.
    ("blocks/attention/query/bias", (48, 15, 105), PartitionSpec(None, None, None)),
]


@pytest.mark.parametrize(("path", "shape", "spec"), FOLDED)
def test_the_table_on_a_folded_mesh(
    path: str, shape: tuple[int, ...], spec: PartitionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_lib, "MAX_DATA", 4)
    assert sharding.partition_spec(path, shape, mesh(replica=1, data=8, model=1)) == spec


def test_a_model_axis_that_does_not_divide_the_classes_leaves_the_classifier_to_data() -> None:
    on = mesh(replica=1, data=4, model=2)
    assert sharding.partition_spec("head/kernel", (1664, 29_593), on) == PartitionSpec("data", None)
    assert sharding.partition_spec("head/bias", (29_593,), on) == PartitionSpec(None)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"mesh.model=2 does not divide axis 2 of blocks/attention/query/kernel"):
        sharding.partition_spec("blocks/attention/query/kernel", (2, 768, 3, 256), mesh(replica=1, data=4, model=2))
    with pytest.raises(ValueError, match=r"is large and mesh.data=4 divides no axis of it"):
        sharding.partition_spec("odd", (333, 333), mesh(replica=1, data=4, model=2))


@pytest.mark.parametrize("size", ["S/16", "B/16", "g/14"])
def test_no_large_leaf_of_a_state_is_left_whole(size: str) -> None:
    """Parameters and the optimizer's state; 99% of the bytes are split over all eight devices."""
    from vit_scaling.optim import optimizer

    config = vit.variant(size, pool="map")

    def state() -> dict:
        built = models.build(config, image_size=(224, 224), num_classes=1000, key=jax.random.key(0))
        params = models.split(built)[1]
        return {"params": params, "opt": optimizer.create(optimizer.OptimConfig(), params).init(params)}

    shapes = jax.eval_shape(state)
    shardings = sharding.tree_shardings(shapes, mesh(replica=1, data=8, model=1))
    whole = split = 0
    for leaf, on in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        nbytes = leaf.size * leaf.dtype.itemsize
        if on.is_fully_replicated:
            assert leaf.size < sharding.MIN_SHARDED_SIZE
            whole += nbytes
        else:
            split += nbytes
    assert whole < 0.01 * (whole + split)


def test_optimizer_state_is_split_as_its_parameter() -> None:
    shape = jax.ShapeDtypeStruct((12, 768, 3072), np.float32)
    tree = {"params": {"blocks": {"mlp": {"up": {"kernel": shape}}}}}
    nested = {"momentum": tree["params"], "count": jax.ShapeDtypeStruct((), np.int32)}
    on = mesh(replica=1, data=4, model=2)
    found = sharding.tree_shardings(nested, on)
    assert found["momentum"]["blocks"]["mlp"]["up"]["kernel"].spec == PartitionSpec(None, "data", "model")
    assert found["count"].spec == PartitionSpec()


def test_the_printed_table() -> None:
    tree = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((12, 768, 3072), np.float32)}}}}
    (row,) = sharding.describe(tree, mesh(replica=2, data=2, model=2))
    assert row.bytes_per_device == 12 * 768 * 3072 * 4 // 4
    assert row.spec == PartitionSpec(None, "data", "model")
    assert row.split == "data 1, model 2"


def test_constrain_is_the_identity_without_a_mesh() -> None:
    x = jax.numpy.ones((4, 2))
    assert sharding.constrain(x) is x


def test_constrain_splits_the_batch_within_a_mesh() -> None:
    on = mesh(replica=2, data=2, model=2)
    with jax.set_mesh(on):
        y = jax.jit(lambda x: sharding.constrain(x * 2.0))(np.ones((8, 3), np.float32))
    assert y.sharding.shard_shape((8, 3)) == (2, 3)


def test_a_batch_keeps_its_order_over_the_devices() -> None:
    on = sharding.batch_sharding(mesh(replica=2, data=2, model=2))
    local = {"image": np.arange(8 * 3).reshape(8, 3)}
    np.testing.assert_array_equal(sharding.put_batch(local, on)["image"], local["image"])


def test_paths_and_stacks() -> None:
    tree = {"a": {"blocks": {"b": 1}}, "c": 2}
    assert names.unflatten(names.flatten(tree)) == tree
    assert names.stacked_dims("stage/blocks/x/blocks/kernel") == 2
    assert names.stacked_dims("head/kernel") == 0
    with pytest.raises(ValueError, match="no rule names the parameter 'x/kernel'"):
        names.first_match([("kernel", 1)], "x/kernel")
