"""Updates that are not finite, other meshes, and another Python."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.campaign import STEPS, Kind, Lab, Verdict, arrays, judge, outcome
from tests.faults.kinds.signals import moment
from tests.faults.starts import Inside

KINDS: dict[str, Kind] = {}


def poisoned(lab: Lab, draw: random.Random) -> Verdict:
    """An image, the loss or the gradients of one step are not finite: that update is left out, also in a killed run."""
    label, at = "NaN or infinity in a step", draw.randrange(STEPS)
    inside = Inside(poison=(draw.choice(("image", "loss", "grad")), draw.choice((float("nan"), float("inf"))), at))
    detail = f"{inside.poison}"
    if at not in lab.references:  # whatever is not finite, what remains is the same run without that update
        reference = lab.folder / f"poisoned{at}"
        ended = lab.start(reference, inside=Inside(poison=("loss", float("nan"), at))).wait()
        assert ended.code == 0, ended.error
        lab.references[at] = outcome(reference)
        if lab.references[at]["arrays"] == lab.reference["arrays"]:
            return Verdict(label, detail, "lost", "the update was not left out")
    workdir = lab.new()
    running = lab.start(workdir, inside=inside)
    moment_detail, come = moment(workdir, draw)
    running.stop_at(come, signal.SIGKILL)
    running.wait()
    verdict = judge(
        lab,
        workdir,
        label,
        f"{detail}, killed {moment_detail}",
        reference=lab.references[at],
        again=lambda: lab.start(workdir, inside=inside).wait(),
    )
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["skipped"] for row in rows if row.get("step") == STEPS and "skipped" in row]
    if verdict.answer != "lost" and skipped and skipped[-1] != 1:
        return Verdict(label, detail, "lost", f"{skipped[-1]} updates counted as skipped")
    return verdict


KINDS["NaN or infinity in a step"] = poisoned

OVERFLOWS = (
    ("optim.lr=1e30",),
    ("optim.lr=3e38",),
    ("optim.weight_decay=1e38",),
    ("loss.head_bias=3e38",),
    ("loss.head_bias=-3e38", "loss.kind=sigmoid"),
    ("model.dtype=bfloat16", "loss.head_bias=3e38"),
    ("model.dtype=bfloat16", "optim.lr=1e37"),
    ("model.dtype=bfloat16", "optim.lr=1e20"),
    ("optim.ema=0.999999999",),
)


def overflow(lab: Lab, draw: random.Random) -> Verdict:
    """Numbers that overflow, in float32 and bfloat16: refused, or a run whose checkpoints are all finite."""
    overrides, workdir = draw.choice(OVERFLOWS), lab.new()
    flags = [f"--config.{override}" for override in (*overrides, "log.stop_after_skipped=3")]
    ended = lab.start(workdir, *flags).wait()
    detail = " ".join(overrides)
    if ended.code != 0 and not ended.is_clear:
        return Verdict("overflow", detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    if wrong := not_finite(workdir):
        return Verdict("overflow", detail, "lost", wrong)
    said = next((line for line in ended.error.splitlines() if line.startswith("error: ")), "")
    return Verdict("overflow", detail, "refused" if ended.code else "equal", said)


def not_finite(workdir: Path) -> str | None:
    for checkpoint in workdir.glob("checkpoints/*/commit_success.txt"):
        for path, array in arrays(checkpoint.parent).items():
            if not np.isfinite(array).all():
                return f"{path} of checkpoint {checkpoint.parent.name} is not finite"
    return None


KINDS["overflow"] = overflow


def nearly_equal(lab: Lab, workdir: Path, label: str, detail: str, ended: Any) -> Verdict:
    """The verdict on a run that went on elsewhere, where sums are rounded in another order."""
    if ended.is_clear:
        return Verdict(label, detail, "refused", ended.error.strip().splitlines()[-1])
    if ended.code != 0:
        return Verdict(label, detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    ours = arrays(workdir / "checkpoints" / str(STEPS))
    theirs = arrays(lab.whole / "checkpoints" / str(STEPS))
    apart = max(float(np.abs(ours[path] - theirs[path]).mean()) for path in theirs)
    if not apart < 1e-4:
        return Verdict(label, detail, "lost", f"parameters differ by {apart:g}")
    return Verdict(label, detail, "equal", f"parameters differ by {apart:g} on average")


def other_mesh(lab: Lab, draw: random.Random) -> Verdict:
    devices, workdir = draw.choice((2, 4, 8)), lab.half()
    flags = draw.choice(((), ("--config.mesh.data=-1",), ("--config.mesh.model=2", "--config.mesh.data=-1")))
    ended = lab.start(workdir, *flags, inside=Inside(devices=devices)).wait()
    detail = f"{devices} devices {' '.join(flags)}"
    return nearly_equal(lab, workdir, "more devices", detail, ended)


KINDS["more devices"] = other_mesh


def fewer_devices(lab: Lab, draw: random.Random) -> Verdict:
    devices, workdir = draw.choice((2, 4)), lab.new()
    running = lab.start(workdir, inside=Inside(devices=devices))
    detail, come = moment(workdir, draw)
    running.stop_at(come, signal.SIGKILL)
    running.wait()
    return nearly_equal(lab, workdir, "fewer devices", f"{devices}, killed {detail}", lab.start(workdir).wait())


KINDS["fewer devices"] = fewer_devices


def another_python(lab: Lab, draw: random.Random) -> Verdict:
    """The half-finished run goes on with another Python and JAX."""
    del draw
    assert lab.python is not None
    workdir = lab.half()
    ended = lab.alone(workdir, python=lab.python).wait()
    return nearly_equal(lab, workdir, "another Python", lab.python, ended)


KINDS["another Python"] = another_python
