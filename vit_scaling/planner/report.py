"""One plan as text, and several plans as rows of a table."""

from vit_scaling.names import render_table
from vit_scaling.parallel.chips import GIB
from vit_scaling.planner.plan import Plan


def text(plan: Plan, price: float | None = None) -> str:
    """Returns the whole plan, as lines; with the price of the run where that of one chip for an hour is given."""
    lines = [
        f"{plan.machine}: {plan.chips} chips, {plan.devices} devices; mesh {_mesh(plan)}",
        f"batch {plan.batch_size}{_accumulate(plan)}, remat {plan.remat}, {plan.params:,} parameters, "
        f"train state {plan.state_bytes / GIB:.2f} GiB",
        "",
        render_table(
            ("parameter", "shape", "split over", "MB per device"), [(*r[:3], f"{r[3] / 1e6:.3f}") for r in plan.table]
        ),
        "",
    ]
    lines.append("fits" if plan.fits else "DOES NOT FIT")
    if plan.message:
        lines.append(f"  {plan.message}")
    if plan.memory is not None:
        m = plan.memory
        parts = (("state and batch", m.arguments), ("outputs", m.outputs), ("temporaries", m.temporaries))
        lines += [f"  {name:16s} {size / GIB:8.3f} GiB" for name, size in (*parts, ("program", m.program))]
        lines.append(f"  {'total':16s} {m.needed / GIB:8.3f} of {m.available / GIB:.2f} GiB per device")
    if plan.compile_seconds is not None:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s; attention: {plan.attention}")
    if plan.moved:
        rows = [
            (m.kind, f"{m.count}", f"{m.payload / 1e6:,.1f}", f"{m.ici / 1e6:,.1f}", f"{m.dcn / 1e6:,.1f}")
            for m in plan.moved
        ]
        lines += ["", "collectives of a step, in MB per device:"]
        lines.append(render_table(("kind", "times", "results", "received over ICI", "received over DCN"), rows))
    if plan.bounds is not None and plan.mfu_ceiling is not None and plan.chip_days is not None:
        b = plan.bounds
        lines += [
            "",
            f"model FLOPs per step: {plan.model_flops:.3e}; with what remat recomputes: {plan.executed_flops:.3e}",
            "lower bounds on the step time, at the published peaks:",
            f"  arithmetic     {1e3 * b.compute:10.2f} ms",
            f"  memory         {1e3 * b.memory:10.2f} ms ({(plan.memory_traffic or 0) / 1e9:.1f} GB per device)",
            f"  ICI or NVLink  {1e3 * b.ici:10.2f} ms",
            f"  DCN            {1e3 * b.dcn:10.2f} ms",
            f"MFU at most {100 * plan.mfu_ceiling:.0f}%, limited by {b.limit}",
            f"whole run: {plan.steps:,} steps, {plan.images:,} images, at least {plan.chip_days:,.1f} chip-days "
            f"({plan.chip_days / plan.chips:.2f} days)",
        ]
        if price is not None:
            lines.append(
                f"price of the whole run: at least {24 * plan.chip_days * price:,.2f}, at {price:g} per chip-hour; "
                f"at half that MFU {48 * plan.chip_days * price:,.2f}"
            )
    return "\n".join(lines)


_COLUMNS = {
    "mesh": 12,
    "batch": 7,
    "microbatches": 12,
    "remat": 5,
    "GiB per device": 14,
    "fits": 16,
    "step >= ms": 10,
    "limited by": 12,
    "MFU <= %": 8,
}


def header() -> str:
    """Returns the names above the lines that `row` returns."""
    return "  ".join(name.ljust(width) for name, width in _COLUMNS.items()).rstrip()


def row(plan: Plan) -> str:
    """Returns a plan as one line of a table."""
    memory = "-" if plan.memory is None else f"{plan.memory.needed / GIB:.2f}"
    cells = [_mesh(plan), str(plan.batch_size), str(plan.accumulate), plan.remat, memory]
    if plan.fits and plan.bounds is not None and plan.mfu_ceiling is not None:
        cells += ["yes", f"{1e3 * plan.bounds.step:.0f}", plan.bounds.limit, f"{100 * plan.mfu_ceiling:.0f}"]
    else:
        cells += ["no" if plan.short_by is None else f"no, by {plan.short_by / GIB:.1f} GiB", "-", "-", "-"]
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)).rstrip()


def _mesh(plan: Plan) -> str:
    data = plan.mesh["data"] * plan.mesh["fold"]
    return f"{plan.mesh['replica']} x {data} x {plan.mesh['model']}"


def _accumulate(plan: Plan) -> str:
    return f" in {plan.accumulate} microbatches" if plan.accumulate > 1 else ""
