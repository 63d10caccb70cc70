"""Robust least squares with bounds, for many data sets at once.

R fits (starts or bootstrap replicates), P points, K coefficients. Every fit has its own weights of the same points.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Values = Floats | np.float64  # what NumPy gives for arrays of any rank, zero included
# theta_RK -> (values_RP, derivatives_RPK)
Curve = Callable[[Floats], tuple[Floats, Floats]]

KNEE_STEPS = 12  # at most so many fits until the knee has settled
KNEE = 2.0  # in standard deviations: 98% of the efficiency of least squares under normal noise


def spread(residual_RP: Floats, weight_RP: Floats) -> Floats:
    """Returns [R] the weighted median absolute residual, scaled to the standard deviation of normal noise."""
    order = np.argsort(np.abs(residual_RP), axis=-1)
    size = np.take_along_axis(np.abs(residual_RP), order, -1)
    below = np.cumsum(np.take_along_axis(weight_RP, order, -1), axis=-1)
    middle = np.argmax(below >= 0.5 * below[..., -1:], axis=-1)
    return 1.4826 * np.take_along_axis(size, middle[..., None], -1)[..., 0]


def loss(residual_RP: Floats, weight_RP: Floats, limit_R: Floats) -> Floats:
    """Returns [R] the smooth Huber loss: quadratic well below `limit`, linear beyond; least squares if infinite."""
    root = np.sqrt(1.0 + (residual_RP / limit_R[:, None]) ** 2)
    return np.sum(weight_RP * residual_RP**2 / (1.0 + root), axis=-1)


def minimize(
    curve: Curve,
    y_RP: Floats,
    weight_RP: Floats,
    start_RK: Floats,
    lower_K: Floats,
    upper_K: Floats,
    limit_R: Floats,
    *,
    steps: int = 200,
) -> tuple[Floats, Floats]:
    """Returns (theta_RK, loss_R) by Levenberg and Marquardt's method within bounds.

    A coefficient at a bound that the gradient pushes outwards is held for that step. Fits that have converged leave
    the batch.
    """
    theta_RK = np.clip(start_RK, lower_K, upper_K)
    loss_R = loss(curve(theta_RK)[0] - y_RP, weight_RP, limit_R)
    damping_R = np.full(len(theta_RK), 1e-3)
    live = np.arange(len(theta_RK))
    eye = np.eye(theta_RK.shape[1])
    for _ in range(steps):
        theta, weight, limit, damping = theta_RK[live], weight_RP[live], limit_R[live], damping_R[live]
        y = y_RP[live]
        value, slope = curve(theta)
        residual = value - y
        weighted = (weight / np.sqrt(1.0 + (residual / limit[:, None]) ** 2))[..., None] * slope
        gradient = np.einsum("rp,rpk->rk", residual, weighted)
        hessian = np.swapaxes(weighted, 1, 2) @ slope
        held = ((theta <= lower_K) & (gradient > 0)) | ((theta >= upper_K) & (gradient < 0))
        scale = np.maximum(np.einsum("rkk->rk", hessian), 1e-12)
        system = hessian + (damping[:, None] * scale)[:, :, None] * eye
        system = np.where(held[:, :, None] | held[:, None, :], eye, system)
        move = -np.linalg.solve(system, np.where(held, 0.0, gradient)[..., None])[..., 0]
        trial = np.clip(theta + move, lower_K, upper_K)
        cost, trial_cost = loss_R[live], loss(curve(trial)[0] - y, weight, limit)
        better = trial_cost < cost
        theta_RK[live] = np.where(better[:, None], trial, theta)
        loss_R[live] = np.where(better, trial_cost, cost)
        damping_R[live] = np.where(better, np.maximum(damping / 5, 1e-12), damping * 4)
        done = (better & (cost - trial_cost <= 1e-12 * cost)) | (damping_R[live] > 1e8)
        live = live[~done]
        if not len(live):
            break
    return theta_RK, loss_R


def nodes(basis: Callable[[Floats], Floats], grid_SJ: Floats, y_P: Floats, scale_P: Floats, keep: int) -> Floats:
    """Returns [keep, J + M] the best nodes of a grid of exponents, with the M linear coefficients that fit there.

    Args:
        basis: exponents [J] to the columns [P, M] that the coefficients, none negative, multiply.
        scale_P: what residuals are divided by.
    """
    found = []
    for exponents in grid_SJ:
        linear, size = nnls(basis(exponents) / scale_P[:, None], y_P / scale_P)
        found.append((size, *exponents, *linear))
    return np.array(sorted(found)[:keep])[:, 1:]


def refine(
    curve: Curve,
    y_RP: Floats,
    weight_RP: Floats,
    start_SK: Floats,
    lower_K: Floats,
    upper_K: Floats,
    *,
    squares: bool = False,
) -> Floats:
    """Returns [R, K] the best fit of every row of weights from all the given starts.

    The knee of each fit's loss follows its own residuals; with `squares` there is none.
    """

    def limits(theta: Floats, y: Floats, weight: Floats) -> Floats:
        if squares:
            return np.full(len(theta), np.inf)
        return np.maximum(KNEE * spread(curve(theta)[0] - y, weight), 1e-12)

    fits, starts = len(weight_RP), len(start_SK)
    theta = np.tile(start_SK, (fits, 1))
    y, weight = np.repeat(y_RP, starts, axis=0), np.repeat(weight_RP, starts, axis=0)
    # All starts of one fit compete under one limit, the least of theirs.
    limit = np.repeat(limits(theta, y, weight).reshape(fits, starts).min(axis=1), starts)
    theta, cost = minimize(curve, y, weight, theta, lower_K, upper_K, limit)
    theta = theta.reshape(fits, starts, -1)[np.arange(fits), cost.reshape(fits, starts).argmin(axis=1)]
    live, before = np.arange(fits), np.zeros(fits)
    for _ in range(0 if squares else KNEE_STEPS if fits == 1 else 3):  # replicates need no such precision
        limit = limits(theta[live], y_RP[live], weight_RP[live])
        moved = ~np.isclose(limit, before[live], rtol=1e-9, atol=0.0)
        live, limit = live[moved], limit[moved]
        if not len(live):
            break
        theta[live], _ = minimize(curve, y_RP[live], weight_RP[live], theta[live], lower_K, upper_K, limit)
        before[live] = limit
    return theta


def replicates(points: int, count: int, seed: int) -> Floats:
    """Returns [count, points] the weights of bootstrap replicates: how often each draws every point."""
    return np.random.default_rng(seed).multinomial(points, np.full(points, 1 / points), count).astype(np.float64)
