"""Search for the mesh, remat policy and number of microbatches of a config on a machine, by compiling candidates.

Candidates are ranked by images per second at the lower bound of the step time. For each mesh and batch, policies are
tried from "none" to "full" until one fits and is not limited by memory traffic: activations that are recomputed are
neither written nor read. "dots" repeats no matrix product; "full" costs a forward pass. A batch that does not fit with
"dots" is also tried in microbatches, which compute nothing twice but gather the kernels more often. FSDP comes first.
Tensor parallelism, which needs less memory, and more replicas, which communicate less, are tried if FSDP does not fit
or is limited by the network.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from vit_scaling.config import Config
from vit_scaling.parallel.mesh import MeshConfig
from vit_scaling.planner.machines import Topology
from vit_scaling.planner.plan import Plan, make, with_remat

POLICIES = ("none", "dots", "full")
MAX_MICROBATCHES = 64


def search(
    config: Config,
    machine: Topology,
    *,
    num_classes: int,
    batch_sizes: Sequence[int] = (),
    multi_label: bool = False,
    found: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Returns all plans that were tried: first those that fit, the best one first.

    Args:
        batch_sizes: tried in addition to the config's own.
        found: called with each plan as it is made.

    Raises:
        ValueError: no mesh of this machine can hold the batch; the sentence is about the last one tried.
    """
    plans: list[Plan] = []
    refused: ValueError | None = None
    for batch_size in dict.fromkeys((config.data.batch_size, *batch_sizes)):
        for mesh in meshes(machine):
            before = len(plans)
            try:
                for plan in _policies_and_microbatches(config, machine, mesh, batch_size, num_classes, multi_label):
                    plans.append(plan)
                    found(plan)
            except ValueError as error:  # this mesh cannot hold this batch or this model
                refused = error
                continue
            if any(
                plan.bounds is not None and plan.bounds.limit not in ("ici", "dcn")
                for plan in plans[before:]
                if plan.fits
            ):
                break
    if not plans:
        assert refused is not None
        raise refused
    return sorted(plans, key=lambda plan: (not plan.fits, -images_per_second(plan)))


def images_per_second(plan: Plan) -> float:
    """Returns images per second at the lower bound of the step time; 0 for a plan that does not fit."""
    return plan.batch_size / plan.bounds.step if plan.fits and plan.bounds is not None else 0.0


def meshes(machine: Topology) -> Iterator[MeshConfig]:
    """Yields FSDP, then FSDP with tensor parallelism, then hybrids with more replicas."""
    slices = machine.slices
    within = machine.devices // slices
    yield MeshConfig(replica=slices)
    if within % 2 == 0:
        yield MeshConfig(replica=slices, model=2)
    if within > 16:
        yield MeshConfig(replica=slices * (within // 16), data=16)


def _policies_and_microbatches(
    config: Config, machine: Topology, mesh: MeshConfig, batch_size: int, num_classes: int, multi_label: bool
) -> Iterator[Plan]:
    def attempt(policy: str, microbatches: int) -> Plan:
        candidate = with_remat(config, policy)
        assert candidate is not None
        candidate = dataclasses.replace(
            candidate,
            mesh=mesh,
            data=dataclasses.replace(config.data, batch_size=batch_size),
            optim=dataclasses.replace(config.optim, accumulate=microbatches),
        )
        return make(candidate, machine, num_classes=num_classes, multi_label=multi_label)

    policies = [policy for policy in POLICIES if with_remat(config, policy) is not None]
    for policy in policies:
        plan = attempt(policy, 1)
        yield plan
        if plan.fits and plan.bounds is not None and plan.bounds.limit != "memory":
            return
        if plan.fits or (policy == "none" and "dots" in policies):
            continue  # with "dots" a microbatch can be larger, for the same work
        # The missing memory tells how many microbatches are needed; the state is left out of the estimate.
        needed = 2 if plan.short_by is None else 1 + plan.short_by / machine.chip.memory
        microbatches = 2 ** max(1, math.ceil(math.log2(needed)))
        while not plan.fits and microbatches <= MAX_MICROBATCHES:
            try:
                plan = attempt(policy, microbatches)
            except ValueError:  # the batch does not divide into so many
                break
            yield plan
            microbatches *= 2
