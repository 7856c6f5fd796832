"""The ODE with a diffusion's marginals (Score-SDE, section 4.3): likelihoods without the KL terms, encodings, and back.

The likelihood is exact for continuous data; for images of grey levels bits/dim are an upper bound (see `ode_bits_per_dim`).

dx/dt = f(t) x - g(t)^2 / 2 score(x, t) takes data at t = eps to noise at t = 1 without randomness. It is solved by
torchdiffeq's Dormand-Prince steps, whose size follows the image of a batch that has the largest error. Times are as in `sde`.
Where a process clips the predicted x_0, so does its ODE: the score is then that of the clipped x_0. That is a flow as good as
any, invertible and with a likelihood of its own, for the clipped score is continuous and the change of volume has a value
everywhere but where the clipping sets in.
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.bound import check_images, check_scheduler, standard_error
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.schedulers.precision import finest_dtype, to_float64
from ddpm_hf.schedulers.prediction import SDE_PREDICTIONS
from ddpm_hf.schedulers.sde import SDE, ChainSDE
from ddpm_hf.schedulers.sde_samplers import clip_limits

TRACES = ("rademacher", "gaussian", "exact")


DEQUANTIZATIONS = ("uniform", "decoder")


class OdeStopped(RuntimeError):
    """The solver could not reach the end: too many evaluations, or a state that is not finite."""


class OdeLikelihood(NamedTuple):
    """log p(x) of each of B images by the ODE."""

    log_likelihood: torch.Tensor  # (B,) float64, nats, summed over the dimensions
    probe_error: torch.Tensor  # (B,) float64, nats: its error by the probes; 0 for the exact trace, NaN for one probe
    latents: torch.Tensor  # (B, C, H, W), x at t = 1
    evaluations: torch.Tensor  # (B,) int64: of the network for this image


class OdeBitsPerDim(NamedTuple):
    """Bits per dimension of each of B images by the ODE, for one draw of what dequantizes them."""

    total: torch.Tensor  # (B,) float64
    probe_error: torch.Tensor  # (B,), as in `OdeLikelihood`, in bits per dimension
    latents: torch.Tensor  # (B, C, H, W)
    evaluations: torch.Tensor  # (B,) int64

    @property
    def mean(self) -> float:
        """The mean of `total` over the images."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` over images, dequantization and probes together; NaN for a single image."""
        return standard_error(self.total)


def ode_log_likelihood(
    unet: Callable,
    process,
    x: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    trace: str = "rademacher",
    probes: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    max_evaluations: int = 2000,
    progress_bar: bool = False,
) -> OdeLikelihood:
    """log of the density of continuous x, by the instantaneous change of variables (Score-SDE eq. 39).

    Args:
        unet: a network, or anything called as `unet(x_t, label, class_labels=..., return_dict=False)` through which gradients
            go; an `InferenceUNet` has none. Dropout is off while this runs.
        process: an `SDE`, one of its schedulers, or a `VariationalDDPMScheduler` (see `ChainSDE`).
        x: (B, C, H, W), taken for x at t = eps; in [0, 1] if the process is a `VESDEScheduler` that is not centered.
        class_labels: (B,), for a class-conditional network.
        eps: the time to begin at; None for 1e-5, or 1 / T for a chain.
        clip_sample: whether the predicted x_0 is clipped to +-`clip_sample_range`, 1 where the config has none; None for what
            the config of the process says. `thresholding` is not of the ODE.
        rtol, atol: tolerances of a solver's step, for each image: of the root mean square over its dimensions, and of its log
            likelihood in nats a dimension.
        trace: of the score's Jacobian: by Hutchinson's estimator with "rademacher" (signs, of less variance) or "gaussian"
            probes, or "exact", one pass back for each dimension: for small images.
        probes: of the estimator for each image.
        generator: for the probes.
        batch_size: images a call; None for all.
        max_evaluations: of the network for a batch, beyond which it stops.
        progress_bar: show one, in a terminal or a notebook.

    Returns:
        `OdeLikelihood` on the device of x; what is float64 of Apple's GPUs, which have none, on the CPU.

    Raises:
        ValueError: an argument that cannot be used; a process that is not the network's; a network without gradients.
        OdeStopped: too many evaluations, or a state that is not finite, with the time it had reached.
    """
    sde = process_of(process)
    eps, limits = start_time(sde, eps), clip_limits_of(process, clip_sample)
    if trace not in TRACES:
        raise ValueError(f"trace={trace!r} is not known; choose one of {', '.join(TRACES)}")
    if not (isinstance(probes, Integral) and probes >= 1):
        raise ValueError(f"probes={probes!r} must be an integer, 1 or more")
    dimensions, columns = x[0].numel(), 1 if trace == "exact" else probes

    def directions(part):
        if trace == "exact":
            return None
        device = torch.device("cpu") if generator is None else generator.device
        shape, source = (probes, *part.shape), dict(generator=generator, device=device)
        if trace == "gaussian":
            return to_float64(torch.randn(shape, dtype=finest_dtype(device), **source)).to(part.device)
        return torch.randint(0, 2, shape, **source).to(part.device) * 2.0 - 1

    def solve(part, network, bar):
        state, shape = to_float64(part.flatten(1)), part.shape
        e = directions(state.view(shape))

        def slope(t, state):
            x_t = state[:, :dimensions].view(shape)
            with torch.enable_grad():
                x_in = x_t.detach().to(part.device, network.dtype).requires_grad_()
                output = to_float64(network(x_in, sde.conditioning_times(t)))
                if not output.requires_grad:
                    raise ValueError(
                        "the network gives no gradients, which the likelihood needs; give the DDPMUNet itself"
                    )
                score, inside = clipped_score(sde, t, x_t, output.detach(), limits)
                output = output * inside
                if e is None:
                    found = _exact_trace(output, x_in)[None]
                else:
                    found = torch.stack([_along(output, x_in, each) for each in e])
            of_x_t, of_output = sde.score_weights(t)
            share = inside.flatten(1).double().mean(1, keepdim=True)
            # nats a dimension: the trace of the Jacobian of the score, and of the drift
            bend = share * of_x_t + of_output * found.T / dimensions - (1 - share) / sde.std(t) ** 2
            rate, half = sde.drift_coefficient(t), 0.5 * sde.diffusion(t) ** 2
            drift, growth = rate * x_t - half * score, rate - half * bend
            return torch.cat((drift.flatten(1), growth.expand(-1, columns)), dim=1)

        state = torch.cat((state, state.new_zeros(len(part), columns)), dim=1)
        return solve_ode(slope, state, dimensions, eps, 1.0, rtol, atol, max_evaluations, bar)

    found = []
    for part, end, evaluations in solve_in_batches(
        unet, sde, x, class_labels, batch_size, "likelihood", progress_bar, solve
    ):
        latents, gained = end[:, :dimensions].view(part.shape), end[:, dimensions:] * dimensions
        log_likelihood = sde.prior_log_prob(latents) + gained.mean(1)
        error = gained.std(1) / columns**0.5 if columns > 1 else torch.full_like(log_likelihood, math.nan)
        error = torch.zeros_like(error) if trace == "exact" else error
        found.append((log_likelihood, error, latents.to(x), torch.full((len(part),), evaluations)))
    return OdeLikelihood(*(torch.cat(each) for each in zip(*found)))


def ode_bits_per_dim(
    unet: Callable,
    process,
    x_start: torch.Tensor,
    *,
    levels: int | None = None,
    dequantization: str | None = None,
    generator: torch.Generator | None = None,
    eps: float | None = None,
    clip_sample: bool | None = None,
    **how,
) -> OdeBitsPerDim:
    """Bits per dimension of images on a grid of grey levels, by the ODE.

    With "uniform" dequantization noise of one level's width is added, x = x_0 + u with u in +-1 / (levels - 1), and
    -log2 p(x) / D - log2(2 / (levels - 1)) bounds the bits of the grey levels from above (Theis et al. 2016): for a
    network that was trained on such images. With "decoder" they are sent as in the bound of Ho, Jain, Abbeel 2020, with the
    ODE's density in place of L_T and the KL terms:

        -log P(x_0) <= E[-log p(x_t) + log q(x_t | x_0) - log p(x_0 | x_t)],  t the chain's first step, p(x_0 | x_t) its L_0,

    for a network that was trained on grey levels as they are.

    Args:
        unet, process, eps: as in `ode_log_likelihood`; "decoder" needs a `VariationalDDPMScheduler`, whose chain's first step
            is t.
        x_start: (B, C, H, W) on the grid of `levels` grey levels in [-1, 1], float32 or float64.
        levels: grey levels of the data; None for those of the scheduler, 256 if it has none.
        dequantization: "uniform" or "decoder"; None for "decoder" where the process is a `VariationalDDPMScheduler`.
        generator: for dequantization and probes.
        clip_sample: as in `ode_log_likelihood`; with "uniform" None is False, for those images go beyond [-1, 1].
        how: other arguments of `ode_log_likelihood`.

    Returns:
        `OdeBitsPerDim`.

    Raises:
        As `ode_log_likelihood`; ValueError for images off the grid, and for clip_sample=True with "uniform".
    """
    chain = process if hasattr(process, "decoder_bits_per_dim") else None
    levels = getattr(process, "levels", 256) if levels is None else levels
    dequantization = dequantization or ("uniform" if chain is None else "decoder")
    if dequantization not in DEQUANTIZATIONS:
        raise ValueError(f"dequantization={dequantization!r} is not known; choose one of {', '.join(DEQUANTIZATIONS)}")
    if dequantization == "decoder" and chain is None:
        raise ValueError("dequantization='decoder' needs the L_0 of a VariationalDDPMScheduler; choose 'uniform'")
    if dequantization == "decoder" and eps is not None:
        raise ValueError(f"eps={eps}: with dequantization='decoder' the chain's first step is where the ODE begins")
    if dequantization == "uniform" and clip_sample:
        raise ValueError("clip_sample=True cuts off what dequantization='uniform' adds at the ends; leave it out")
    check_images(x_start, levels)
    device, dimensions = "cpu" if generator is None else generator.device, x_start[0].numel()
    if dequantization == "uniform":
        x = to_process_range(process, dequantized(x_start, levels, generator))
        found = ode_log_likelihood(unet, process, x, eps=eps, clip_sample=False, generator=generator, **how)
        width = 2 / (levels - 1) if is_centered(process) else 1 / (levels - 1)
        nats = -found.log_likelihood - dimensions * math.log(width)
    else:
        first = chain.chain[0]
        noise = torch.randn(x_start.shape, generator=generator, device=device, dtype=x_start.dtype).to(x_start.device)
        x = chain.q_sample(x_start, first, noise)
        begin = (first + 1) / chain.config.num_train_timesteps
        how |= dict(eps=begin, clip_sample=clip_sample, generator=generator)
        found = ode_log_likelihood(unet, process, x, **how)
        std = math.sqrt(1 - chain.alphas_cumprod[first].item())
        log_q = -0.5 * (to_float64(noise) ** 2).flatten(1).sum(1) - dimensions * math.log(math.sqrt(2 * math.pi) * std)
        decoder = torch.cat(
            [
                chain.decoder_bits_per_dim(chain.p_mean_variance(output, part, first, True), start, levels)
                for output, part, start in _outputs(unet, x, x_start, first, how)
            ]
        )
        nats = -found.log_likelihood + log_q + to_float64(decoder) * dimensions * math.log(2)
    scale = dimensions * math.log(2)
    return OdeBitsPerDim(nats / scale, found.probe_error / scale, found.latents, found.evaluations)


def dequantized(x_start: torch.Tensor, levels: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Images (B, C, H, W) on a grid of `levels` grey levels in [-1, 1], with uniform noise of one level's width."""
    device = x_start.device if generator is None else generator.device
    u = torch.rand(x_start.shape, generator=generator, device=device, dtype=x_start.dtype).to(x_start.device)
    return x_start + (2 * u - 1) / (levels - 1)


def is_centered(process):
    """Whether the images of a process are in [-1, 1], and not in [0, 1] as NCSN's."""
    return getattr(process, "config", {}).get("centered", True)


def to_process_range(process, x):
    """Images in [-1, 1] in the range of a process."""
    return x if is_centered(process) else x / 2 + 0.5


def process_of(process) -> SDE:
    """The SDE of an `SDE`, of one of its schedulers, or of a `VariationalDDPMScheduler`: `ChainSDE` through all T timesteps.

    Raises:
        ValueError: another scheduler; "previous" prediction; zero terminal SNR.
    """
    if hasattr(process, "alphas_cumprod"):
        check_scheduler(process)
        if process.prediction_type not in SDE_PREDICTIONS:
            raise ValueError(
                f"prediction_type={process.prediction_type!r} is of one step of the chain; the ODE takes the other three"
            )
        return ChainSDE(process.alphas_cumprod, process.prediction_type)
    sde = process.sde if getattr(process, "is_continuous", False) else process
    if not hasattr(sde, "score_weights"):
        raise ValueError(
            f"process is of {type(process)}; give VPSDE, SubVPSDE, VESDE, one of their schedulers, or a "
            "VariationalDDPMScheduler"
        )
    return sde


def start_time(sde, eps):
    eps = sde.t_min if eps is None else eps
    least = sde.t_min if isinstance(sde, ChainSDE) else 0.0
    if not (0 < eps < 1 and eps >= least):
        beside = f", of a chain 1 / T = {least:g} at the least" if least else ""
        raise ValueError(f"eps={eps} must be above 0 and below 1: the time that stands for data{beside}")
    return eps


def clip_limits_of(process, clip_sample):
    """What the predicted x_0 is clipped to, or None."""
    config = getattr(process, "config", {})
    if not (config.get("clip_sample", False) if clip_sample is None else clip_sample):
        return None
    return clip_limits(config)


def clipped_score(sde, t, x_t, output, limits):
    """The score (B, C, H, W) of the predicted x_0 clipped to `limits`, and 1 where that left it as it was, 0 elsewhere."""
    score = sde.score(output, x_t, t)
    if limits is None:
        return score, torch.ones_like(score)
    scale, variance = sde.scale(t), sde.std(t) ** 2
    x_start = (x_t + variance * score) / scale  # Tweedie
    clipped = x_start.clamp(*limits) + 0 * x_start  # an infinite one is not hidden
    inside = clipped == x_start
    return torch.where(inside, score, (scale * clipped - x_t) / variance), inside.to(score.dtype)


class _Network:
    """A network as a function (x_t, label) -> output (B, C, H, W), of fixed classes."""

    def __init__(self, unet, class_labels, x):
        self.unet, self.class_labels, self.channels = unet, class_labels, x.shape[1]
        self.dtype = getattr(unet, "dtype", finest_dtype(x.device))

    def __call__(self, x_t, label):
        label = label.float() if isinstance(label, torch.Tensor) else label
        output = self.unet(x_t.to(self.dtype), label, class_labels=self.class_labels, return_dict=False)[0]
        return output[:, : self.channels]  # learned variances are not asked for


def solve_in_batches(unet, sde, x, class_labels, batch_size, name, progress_bar, solve):
    """(x, end state, evaluations) of each batch, the network in evaluation mode."""
    if x.dim() != 4 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"images have shape {tuple(x.shape)}, {x.dtype}; give floats (B, C, H, W), one image at least")
    if not x.isfinite().all():
        raise ValueError("images have values that are not finite")
    if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r} must be an integer, 1 or more")
    if class_labels is not None and len(class_labels) != len(x):
        raise ValueError(f"class_labels has {len(class_labels)} entries for {len(x)} images; give one each")
    check_network(unet, sde, x.shape[1])
    size = batch_size or len(x)
    labels = [None] * len(x) if class_labels is None else torch.as_tensor(class_labels, device=x.device).split(size)
    with evaluation_mode(unet), tqdm(desc=name, unit=" calls", disable=not progress_bar or None) as bar:
        for part, some in zip(x.split(size), labels):
            end, evaluations = solve(part, _Network(unet, some, x), bar)
            yield part, end, evaluations


def check_network(unet: Callable, sde: SDE, channels: int) -> None:
    """Raises ValueError for a network that a process cannot tell its times, or of other channels than the images."""
    config = getattr(unet, "config", None)
    kind = getattr(config, "time_embedding_type", None)
    told = "fourier" if type(sde).__name__ == "VESDE" else "positional"
    if kind is not None and kind != told:
        raise ValueError(
            f"{type(sde).__name__} needs a network with time_embedding_type={told!r}, this one has {kind!r}: it knows times of "
            "another kind"
        )
    steps = getattr(config, "num_train_timesteps", None)
    if steps is not None and kind == "positional" and steps != sde.N:
        raise ValueError(f"the network was made for T={steps}, the process has N={sde.N}")
    has = getattr(config, "in_channels", channels)
    if has != channels:
        raise ValueError(f"the network has in_channels={has}; the images have {channels} channels")


@torch.no_grad()
def _outputs(unet, x, x_start, t, how):
    """(output, x, x_start) of each batch at a timestep, with what else the network gives."""
    size, labels = how.get("batch_size") or len(x), how.get("class_labels")
    parts = [None] * len(x) if labels is None else torch.as_tensor(labels, device=x.device).split(size)
    with evaluation_mode(unet):
        for part, start, some in zip(x.split(size), x_start.split(size), parts):
            of_dtype = part.to(getattr(unet, "dtype", part.dtype))
            yield unet(of_dtype, t, class_labels=some, return_dict=False)[0], part, start


def _along(output, x, e):
    """e^T J e of each image (B,), with J the Jacobian of output by x and e (B, C, H, W)."""
    (product,) = torch.autograd.grad((output * e).sum(), x, retain_graph=True)
    return (product.to(e.device) * e).flatten(1).sum(1).double()


def _exact_trace(output, x):
    """The trace of each image's Jacobian (B,)."""
    directions = torch.eye(x[0].numel(), dtype=output.dtype, device=output.device).view(-1, 1, *x.shape[1:])
    return sum(_along(output, x, e) for e in directions)


def solve_ode(slope, state, dimensions, begin, end, rtol, atol, max_evaluations, bar):
    """The state (B, n) at `end`, and the evaluations of slope(t, state) that it took."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0: the tolerance of a solver's step")
    count, at = 0, begin

    def counted(t, state):
        nonlocal count, at
        at = t.item()
        if not state.isfinite().all():
            image = int((~state.isfinite()).any(1).nonzero()[0])
            raise OdeStopped(f"the ODE has a state that is not finite at t={at:.4g}, image {image} of the batch")
        if count >= max_evaluations:
            raise OdeStopped(
                f"the ODE from t={begin:g} to {end:g} has reached t={at:.4g} after max_evaluations={max_evaluations}; allow "
                "more, or larger rtol and atol"
            )
        count += 1
        bar.update()
        bar.set_postfix_str(f"t={at:.3g}", refresh=False)
        return slope(t, state)

    def norm(error):  # of the image with the largest
        parts = [error] if dimensions is None else [error[:, :dimensions], error[:, dimensions:]]
        return torch.stack([part.square().mean(1).sqrt() for part in parts]).max()

    times = torch.tensor([begin, end], dtype=torch.float64, device=state.device)
    try:
        # a step ends where the integral does, not beyond it
        options = {"norm": norm, "step_t": times[1:]}
        require_extra("torchdiffeq", "ode", "likelihoods and encodings by the ODE")
        from torchdiffeq import odeint

        states = odeint(counted, state, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        raise OdeStopped(f"the ODE stopped at t={at:.4g} after {count} evaluations: {error}") from None
    return states[-1], count
