"""From a recipe, a scanner, a measurement and a prior to a job that the loop runs."""

from __future__ import annotations

from torch import Tensor

from recon3d import noise as keyed
from recon3d.consistency import (
    Conditional,
    Consistency,
    Gradient,
    Guidance,
    Identity,
    LowPass,
    OrderedSubsets,
    Projection,
    Rho,
    ScaledProjection,
    ScaledRenoise,
    Solve,
)
from recon3d.consistency.scaled import sigma_of, spectral
from recon3d.dormand_prince import Adaptive, DormandPrince
from recon3d.engine.loop import Executor, InProcess, Job, Start
from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import NoiseKey
from recon3d.planes import PLANES, Averaged, Axial, InTurn, Neighbours, Planes
from recon3d.priors.base import Prior, differentiable
from recon3d.priors.paths import VP
from recon3d.recipes.model import PlanesSection, Recipe, TrajectorySection
from recon3d.regularisers import TVz
from recon3d.renoise import DDIM, Ancestral, EulerMaruyama, Full, Heun, Renoise, Rule
from recon3d.trajectory import (
    Level,
    Trajectory,
    descend,
    expected_visits,
    geometric,
    karras,
    sweeps,
    time_travel,
    vp_times,
)

__all__ = ["assemble", "levels", "planes", "trajectory"]


def assemble(
    recipe: Recipe,
    operator: LinearOperator,
    y: Tensor,
    prior: Prior,
    *,
    spacing_mm: float = 1.0,
    weights: Tensor | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    start_image: Tensor | None = None,
    cond: Tensor | None = None,
) -> Job:
    """Assemble the parts that a recipe names.

    Args:
        recipe: its strengths are scaled by the prior's scale and the operator's norm here.
        operator: the scanner; its domain is the volume.
        y: measurement in the operator's range.
        prior: the denoiser of slices.
        spacing_mm: distance of slice centres.
        weights: inverse variances of y, from the noise model; None when it is not known.
        seed: of all random numbers.
        executor: runs the prior; the calling thread by default.
        start_image: the recipe's start image where it is known already; None computes it when the run begins.
        cond: a volume beside the state for a prior that takes a condition.

    Raises:
        ValueError: the recipe needs a noise model or counts, or y does not fit the operator.
    """
    recipe = recipe.resolved()
    if tuple(y.shape) != tuple(operator.range.shape):
        raise ValueError(f"assemble: y must have the operator's range {operator.range.shape}, got {tuple(y.shape)}")
    depth = operator.domain.shape[0]
    start_noise = keyed.independent(depth, seed=seed) if recipe.noise.start == "independent" else None
    used = weights if recipe.consistency.weights == "noise" else None
    guided = recipe.consistency.kind == "gradient" and recipe.consistency.through == "prior"
    renoise = _renoise(recipe, prior, operator, used)
    return Job(
        operator=operator,
        y=y,
        prior=differentiable(prior) if guided else prior,
        trajectory=trajectory(recipe, prior.scale),
        planes=planes(recipe.planes, tuple(operator.domain.shape), prior, seed),
        consistency=ScaledProjection(renoise.sigma_y, renoise.rule, recipe.consistency.on)
        if isinstance(renoise, ScaledRenoise)
        else _consistency(recipe, prior.scale, spacing_mm, used, depth, seed, operator),
        renoise=renoise,
        noise=_noise(recipe, operator, spacing_mm, seed),
        start=Start(
            recipe.start.image if start_image is None else start_image,
            recipe.start.iterations,
            used,
            start_noise,
            recipe.start.subsets,
        ),
        executor=executor or InProcess(),
        cond=cond,
    )


def planes(section: PlanesSection, shape: tuple[int, ...], prior: Prior, seed: int) -> Planes:
    """The slices of a volume that a prior sees, in groups where its card says so."""
    singles: Planes
    if section.kind == "axial":
        singles = Axial(shape[0])
    elif section.kind == "averaged":
        singles = Averaged(shape)
    else:
        order = section.order if section.kind == "in_turn" else [section.kind]
        singles = InTurn(shape, tuple(PLANES[plane] for plane in order), section.second_every, seed)
    slices = getattr(getattr(prior, "card", None), "slices", 1)
    return singles if slices == 1 else Neighbours(singles, shape, slices, seed, section.overlap)


def trajectory(recipe: Recipe, scale: float) -> Trajectory:
    """The trajectory that goes with the recipe's renoising, in user units, of which a network unit has `scale`."""
    kind, section = recipe.renoise.kind, recipe.trajectory
    if kind != "rk45":
        return levels(section, scale, heun=kind == "heun")
    ends = levels(section, scale)
    return Adaptive(ends[0].sigma, ends[-1].sigma, recipe.renoise.rtol + recipe.renoise.atol)


def levels(section: TrajectorySection, scale: float, heun: bool = False) -> list[Level]:
    """The levels in user units, of which a network unit has `scale`; with Heun's second visits where asked for."""
    n, high, low = section.levels, section.sigma_max, section.sigma_min
    if section.grid == "sweeps":
        couplings = geometric(n, high, low) + [low] * section.repeats
        return sweeps(couplings, section.inner, section.inner_floor, scale, section.rho)
    if section.grid == "vp":
        path = VP(beta_max=section.beta_max)
        grid = [path.sigma(t) for t in vp_times(n, section.times, path, section.last_time)]
    elif section.grid == "karras":
        grid = karras(n, high, low, section.rho)
    else:
        grid = geometric(n, high, low) if section.grid == "geometric" else section.sigmas
    grid = [*grid, section.polish] if section.polish else grid
    way = descend(
        grid, scale, section.correctors, section.stale_correctors, section.data_at, heun, bool(section.polish)
    )
    return time_travel(way, section.travel_length, section.travel_repeats) if section.travel_repeats else way


def _consistency(
    recipe: Recipe,
    scale: float,
    spacing_mm: float,
    weights: Tensor | None,
    depth: int,
    seed: int,
    operator: LinearOperator,
) -> Consistency | Guidance:
    c, r = recipe.consistency, recipe.regulariser
    counts = hasattr(operator, "expected")
    if counts != (c.kind in ("em", "gradient")) and c.kind not in ("none", "gradient"):
        needs = "counts of a PET scan" if c.kind == "em" else "a Gaussian measurement; counts take em or gradient"
        raise ValueError(f"recipe {recipe.name}: consistency {c.kind} needs {needs}")
    if c.kind == "gradient":
        return Gradient(c.strength, c.through, c.step, counts, weights, scale, c.subsets, c.on)
    if c.kind == "em":
        return _em(recipe, scale)
    if weights is None and (c.kind == "conditional" or (c.kind == "proximal_cg" and c.rho_rule == "bayes")):
        raise ValueError(
            f"recipe {recipe.name}: its data term weighs the measurement against the prior by their variances; give a "
            "noise model, or set consistency.rho_rule to growing"
        )
    if c.kind == "none":
        return Identity(c.on)
    if c.kind == "projection":
        return Projection(c.relax, c.on)
    if c.kind == "low_pass":
        return LowPass(keyed.independent(depth, seed=seed), c.factor, c.on)
    if c.kind == "conditional":
        assert weights is not None
        return Conditional(weights, keyed.independent(depth, seed=seed), c.iterations, c.scalars)
    rho = None
    if c.kind == "proximal_cg":
        rho = Rho(c.rho_rule, c.rho, c.sigma_ref * scale, c.prior_std * scale if c.prior_std else None)
    tvz = None
    if r.kind == "tvz":
        factor = r.reference_mm / spacing_mm if r.reference_mm else 1.0
        tvz = TVz(r.threshold * scale, factor, r.boundary == "periodic")
    return Solve(
        c.iterations,
        rho,
        tvz,
        r.rho if tvz else 0.0,
        weights,
        c.scalars,
        c.on,
        c.finish,
        c.tolerance,
        c.precondition == "filter",
    )


def _em(recipe: Recipe, scale: float) -> OrderedSubsets:
    c, r = recipe.consistency, recipe.regulariser
    # the unit of an absolute weight is the network's, counts per squared network unit
    value = c.rho / scale**2 if c.rho_rule == "absolute" else c.rho
    anchor = Rho(c.rho_rule, value, c.sigma_ref * scale, c.prior_std * scale if c.prior_std else None)
    return OrderedSubsets(
        iterations=c.iterations,
        subsets=c.subsets,
        anchor=anchor if c.rho else None,
        rdp=r.strength if r.kind == "rdp" else 0.0,
        rdp_rule=r.rule,
        value_scale=scale,
        gamma=r.gamma,
        epsilon=r.epsilon,
        axes=r.axes,
        form=c.form,
        begin=c.begin,
        target=c.target,
        levels=expected_visits(trajectory(recipe, scale)),
        passes=c.passes,
        on=c.on,
    )


def _renoise(recipe: Recipe, prior: Prior, operator: LinearOperator, weights: Tensor | None) -> Renoise:
    r, rule = recipe.renoise, _rule(recipe, prior)
    if recipe.consistency.noise == "scaled":
        known = spectral(operator)
        return ScaledRenoise(rule, r.direction, r.snr, r.norms, operator=known, sigma_y=sigma_of(weights))
    return Renoise(rule, r.direction, r.snr, r.norms)


def _rule(recipe: Recipe, prior: Prior) -> Rule:
    r, scale = recipe.renoise, prior.scale
    std = r.prior_std * scale if r.prior_std else None
    if r.kind == "ddim":
        return DDIM(r.eta, r.convention)
    if r.kind == "ancestral":
        return Ancestral(r.variance, std)
    if r.kind == "em":
        rule = EulerMaruyama(r.clock, scale)
        for level in levels(recipe.trajectory, scale):
            if level.down:
                rule.weights(level.sigma, level.down)  # a step too long is told before the run
        return rule
    if r.kind == "heun":
        return Heun()
    if r.kind == "rk45":
        return DormandPrince(r.rtol, r.atol * scale, prior.offset, levels(recipe.trajectory, scale)[-1].sigma)
    return Full(std, r.amount)


def _noise(recipe: Recipe, operator: LinearOperator, spacing_mm: float, seed: int) -> NoiseKey:
    depth, *shape = operator.domain.shape
    if recipe.noise.kind == "iscs":
        key = keyed.iscs(depth, seed=seed)
        if recipe.noise.angle == "expected":
            return key
        if operator.domain.dtype.is_complex:
            shape[-1] *= 2
        return keyed.Slerp(seed, 0, key.anchors, key.coefficients, shape=tuple(shape))
    if recipe.noise.kind == "iscs_mm":
        return keyed.iscs_mm(depth, spacing_mm, recipe.noise.correlation_mm, seed=seed)
    return keyed.independent(depth, seed=seed)
