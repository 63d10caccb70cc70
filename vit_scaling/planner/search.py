"""Which mesh, remat policy and number of parts a config should have on a machine: tried out, not guessed.

Images a second at the bound of a step decide. For a mesh and a batch the policies are tried from "none" to "full" until
one fits and does not wait for the device's memory: what is computed again need not be written and read. "dots" repeats
no matrix product, "full" costs a forward pass. A batch that does not fit with "dots" is tried in parts too, which
computes no more and only gathers the kernels more often. Fully sharded data parallelism comes first. Tensor
parallelism, which needs less memory, and more replicas, which need less of the network, are tried where it does not fit
or waits for the network.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from vit_scaling.config import Config
from vit_scaling.parallel.chips import Topology
from vit_scaling.parallel.mesh import MeshConfig
from vit_scaling.planner.plan import Plan, make, with_remat

POLICIES = ("none", "dots", "full")
MAX_PARTS = 64


def search(
    config: Config,
    machine: Topology,
    *,
    num_classes: int,
    batch_sizes: Sequence[int] = (),
    multi_label: bool = False,
    found: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Returns the plans that were tried, those that fit first, the best one at the head.

    Args:
        batch_sizes: to try beside the config's own.
        found: called with each plan as it is made.

    Raises:
        ValueError: no mesh of this machine can hold the batch; the sentence is that of the last one tried.
    """
    plans: list[Plan] = []
    refused: ValueError | None = None
    for batch_size in dict.fromkeys((config.data.batch_size, *batch_sizes)):
        for mesh in meshes(machine):
            before = len(plans)
            try:
                for plan in _policies_and_parts(config, machine, mesh, batch_size, num_classes, multi_label):
                    plans.append(plan)
                    found(plan)
            except ValueError as error:  # this mesh cannot hold this batch or this model
                refused = error
                continue
            if any(
                plan.bounds is not None and "network" not in plan.bounds.limit for plan in plans[before:] if plan.fits
            ):
                break
    if not plans:
        assert refused is not None
        raise refused
    return sorted(plans, key=lambda plan: (not plan.fits, -images_per_second(plan)))


def images_per_second(plan: Plan) -> float:
    """Returns the images a second at the bound of a step; 0 for a plan that does not fit."""
    return plan.batch_size / plan.bounds.step if plan.fits and plan.bounds is not None else 0.0


def meshes(machine: Topology) -> Iterator[MeshConfig]:
    """Yields fully sharded data parallelism, then with tensor parallelism, then hybrids with more replicas."""
    slices = machine.slices
    within = machine.devices // slices
    yield MeshConfig(replica=slices)
    if within % 2 == 0:
        yield MeshConfig(replica=slices, model=2)
    if within > 16:
        yield MeshConfig(replica=slices * (within // 16), data=16)


def _policies_and_parts(
    config: Config, machine: Topology, mesh: MeshConfig, batch_size: int, num_classes: int, multi_label: bool
) -> Iterator[Plan]:
    def attempt(policy: str, parts: int) -> Plan:
        candidate = with_remat(config, policy)
        assert candidate is not None
        candidate = dataclasses.replace(
            candidate,
            mesh=mesh,
            data=dataclasses.replace(config.data, batch_size=batch_size),
            optim=dataclasses.replace(config.optim, accumulate=parts),
        )
        return make(candidate, machine, num_classes=num_classes, multi_label=multi_label)

    policies = [policy for policy in POLICIES if with_remat(config, policy) is not None]
    for policy in policies:
        plan = attempt(policy, 1)
        yield plan
        if plan.fits and plan.bounds is not None and plan.bounds.limit != "memory":
            return
        if plan.fits or (policy == "none" and "dots" in policies):
            continue  # with "dots" a part can be larger, for the same work
        # What is missing tells how many parts it takes, the state left out of account.
        needed = 2 if plan.short_by is None else 1 + plan.short_by / machine.chip.memory
        parts = 2 ** max(1, math.ceil(math.log2(needed)))
        while not plan.fits and parts <= MAX_PARTS:
            try:
                plan = attempt(policy, parts)
            except ValueError:  # the batch has no so many parts
                break
            yield plan
            parts *= 2
