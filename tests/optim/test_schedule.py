"""Schedules: their formula, their exact ends, durations, and cooldowns branched from a trunk."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling.optim import schedule
from vit_scaling.optim.schedule import Duration, ScheduleConfig


def config(kind="rsqrt", warmup=10_000, cooldown=50_000, timescale=10_000, **fields):
    durations = (Duration(float(steps)) for steps in (warmup, cooldown, timescale))
    return ScheduleConfig(kind, *durations, **fields)


def reference_multiplier(c, step, total):
    """Section 3 of the paper, in Python floats."""
    warmup, cooldown, timescale = (d.amount for d in (c.warmup, c.cooldown, c.timescale))
    after = max(0, step - warmup)
    progress = after / (total - warmup)
    main = {
        "rsqrt": 1 / math.sqrt(1 + after / timescale),
        "constant": 1,
        "linear": c.final + (1 - c.final) * (1 - progress),
        "cosine": c.final + (1 - c.final) * (1 + math.cos(math.pi * progress)) / 2,
    }[c.kind]
    rise = c.start + (1 - c.start) * min(1, step / warmup)
    return main * rise * min(1, (total - step) / cooldown)


@pytest.mark.parametrize("kind", schedule.KINDS)
def test_formula(kind):
    c, total = config(kind, warmup=70, cooldown=130, timescale=41, start=0.05, final=0.1), 1_000
    steps = np.arange(total + 1)
    got = jax.vmap(schedule.create(c, total))(jnp.asarray(steps, jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [reference_multiplier(c, s, total) for s in steps], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", schedule.KINDS)
def test_exact_ends(kind):
    f = schedule.create(config(kind), 1_000_000)
    assert float(f(0)) == 0
    assert float(f(10_000)) == 1
    assert float(f(1_000_000)) == 0
    assert float(f(1_000_001)) == 0
    # no warmup, no cooldown: full at once, and to the end
    f = schedule.create(config(kind, warmup=0, cooldown=0, final=0.25), 100)
    assert float(f(0)) == 1
    assert float(f(100)) == pytest.approx({"linear": 0.25, "cosine": 0.25, "constant": 1}.get(kind, 1.01**-0.5))


def test_published_values():
    """lr 8e-4, warmup and timescale 10k, cooldown 50k, a million steps (ViT-g/14)."""
    f = schedule.create(config(), 1_000_000)
    for step, lr in ((20_000, 5.7e-4), (110_000, 2.4e-4), (940_000, 8.25e-5)):
        assert 8e-4 * float(f(step)) == pytest.approx(lr, rel=0.015)
    # multiplicative cooldown: half of the rsqrt curve halfway down
    assert float(f(975_000)) == pytest.approx(0.5 * (1 + 96.5) ** -0.5, rel=1e-6)
    # the 20k point: ten thousand up, ten thousand down, no plateau
    short = schedule.create(config(cooldown=10_000), 20_000)
    assert float(short(15_000)) == pytest.approx(0.5 * 1.5**-0.5, rel=1e-6)


def test_steps_beyond_two_to_the_24():
    total = 2**24 + 3
    f = schedule.create(config("constant", warmup=0, cooldown=4), total)
    assert [float(f(total - n)) for n in (4, 3, 2, 1, 0)] == [1, 0.75, 0.5, 0.25, 0]


def test_traced_and_plain_steps_agree():
    f = schedule.create(config(warmup=10, cooldown=20, timescale=5), 100)
    assert float(f(37)) == float(jax.jit(f)(jnp.asarray(37, jnp.int32)))


def test_branched_cooldown_follows_the_trunk():
    trunk = config(warmup=100, cooldown=0, timescale=50)
    branch = config(warmup=100, cooldown=40, timescale=50)
    f, g = schedule.create(trunk, 10_000), schedule.create(branch, 400 + 40)
    for step in (0, 50, 399, 400):
        assert float(f(step)) == float(g(step))
    assert float(g(420)) == pytest.approx(0.5 * float(f(420)), rel=1e-6)
    assert [schedule.needs_total(config(kind)) for kind in schedule.KINDS] == [False, False, True, True]


def test_durations():
    assert Duration(3.0, "steps").to_steps(128, 4_000) == 3
    assert Duration(2.0, "epochs").to_steps(128, 4_000) == 62  # 62.5, to even
    assert Duration(3.0, "epochs").to_steps(128, 4_000) == 94  # 93.75
    assert Duration(1e6, "examples").to_steps(4_096, 10) == 244
    assert Duration(0.0, "epochs").to_steps(128, 4_000) == 0
    c = ScheduleConfig("rsqrt", Duration(1.0, "epochs"), Duration(1_000.0, "examples"), Duration(7.0))
    whole = schedule.in_steps(c, 100, 500)
    assert [d.amount for d in (whole.warmup, whole.cooldown, whole.timescale)] == [5, 10, 7]
    assert c.warmup.unit == "epochs"  # the given config is left alone
    schedule.create(whole, 15)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Duration(1.0, "days").to_steps(1, 1), "days.*steps, epochs, examples"),
        (lambda: Duration(-1.0).to_steps(1, 1), "-1.0"),
        (lambda: Duration(float("nan")).to_steps(1, 1), "nan"),
        (lambda: Duration(10.0, "examples").to_steps(1_000, 1), "10 examples.*1000"),
        (lambda: schedule.in_steps(ScheduleConfig(warmup=Duration(1.0, "day")), 1, 1), "schedule.warmup.*day"),
        (lambda: schedule.create(ScheduleConfig(warmup=Duration(1.0, "epochs")), 10**6), "schedule.warmup.*1 epochs"),
        (lambda: schedule.create(ScheduleConfig(warmup=Duration(1.5)), 10**6), "schedule.warmup.*1.5"),
        (lambda: schedule.create(config("poly"), 10**6), "poly.*rsqrt, constant, linear, cosine"),
        (lambda: schedule.create(config(), 59_999), "10000.*50000.*59999"),
        (lambda: schedule.create(config(timescale=0), 10**6), "timescale"),
        (lambda: schedule.create(config(start=1.5), 10**6), "schedule.start.*1.5"),
        (lambda: schedule.create(config(final=-1.0), 10**6), "schedule.final.*-1"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()


def test_durations_are_rounded_to_the_nearest_step():
    assert Duration(3, "epochs").to_steps(128, 4000) == 94  # 93.75
    assert Duration(1000, "examples").to_steps(96, 4000) == 10  # 10.4
    assert Duration(3).to_steps(128, 4000) == 3
