"""The price of a run, as a plan prints it."""

from vit_scaling.planner import report
from vit_scaling.planner.plan import Bounds, Plan


def test_the_price_is_chip_hours_times_the_price_of_one() -> None:
    plan = Plan(
        machine="v5e:4x4", devices=16, chips=16, mesh={"replica": 1, "data": 16, "fold": 1, "model": 1},
        batch_size=1024, accumulate=1, remat="full", params=10, state_bytes=120, fits=True, message="", short_by=None,
        memory=None, compile_seconds=None, attention=None, moved=(), memory_traffic=1e9, model_flops=1e12,
        executed_flops=2e12, bounds=Bounds(0.1, 0.05, 0.01, 0.0), mfu_ceiling=0.5, images=1024, steps=1, chip_days=2.5,
        table=(),
    )  # fmt: skip
    text = report.text(plan, 1.2)
    assert text.endswith("price of the whole run: at least 72.00, at 1.2 per chip-hour; at half that MFU 144.00")
    assert "price" not in report.text(plan)
