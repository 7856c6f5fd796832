"""Training losses of diffusion models, one number for each image."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.schedulers.ddpm import FIXED_VARIANCES, VariationalDDPMScheduler
from ddpm_hf.schedulers.gaussian import discretized_gaussian_log_likelihood, gaussian_kl, nats_to_bits_per_dim
from ddpm_hf.schedulers.precision import finest_dtype, in_working_precision
from ddpm_hf.schedulers.prediction import BOUNDED_PREDICTIONS, epsilon_weights, x_start_weights
from ddpm_hf.schedulers.sde import SDE, broadcast
from ddpm_hf.schedulers.tables import posterior_mean_weights
from ddpm_hf.training.noise_schedule import LearnedNoiseSchedule
from ddpm_hf.training.timesteps import ContinuousTimes, FractionalTimesteps

LOSSES = ("simple", "vlb", "hybrid")


SCORE_WEIGHTINGS = ("variance", "likelihood")


# The weight of the squared error of x_0, as a function of SNR = abar / (1 - abar). For unweighted epsilon prediction it is SNR.
WEIGHTINGS = {
    "min_snr": lambda snr: np.minimum(snr, 5.0),  # Hang et al. 2023, gamma = 5
    "truncated_snr": lambda snr: np.maximum(snr, 1.0),  # Salimans & Ho 2022
    "p2": lambda snr: snr / (1.0 + snr),  # Choi et al. 2022, k = gamma = 1
}


class DiffusionObjective:
    """The loss of Algorithm 1 and its variants.

    Args:
        scheduler: provides q, the prediction type and the variances; timesteps are drawn from its chain.
        loss: "simple" is the mean squared error of the prediction (Ho, Jain, Abbeel 2020, eq. 14), without the channels of a
            learned variance. "vlb" is N times the bound's term at the drawn t in bits/dim, where N is the chain's length; its
            mean over t is the bound without L_T (eq. 5), and with a fixed variance it has the weights of eq. 12. "hybrid" is
            simple + vlb_weight * vlb with the mean detached in vlb, so that the bound trains the variance alone (IDDPM
            eq. 16).
        vlb_weight: the weight of vlb in "hybrid". The code of IDDPM calls 0.001 (at N = 1000) rescaled_mse, 1 / N mse, and
            "vlb" rescaled_kl.
        noise_schedule: a schedule to learn together with the network, only for "vlb". The objective then copies the scheduler
            and sets the copy's betas at each call. It adds L_T to the loss, so the mean over t is the whole bound. The loss is
            differentiable in the schedule's parameters, also through x_t (reparameterization).
        weighting: the weighting of the mean squared error by t: None; "min_snr" (Hang et al. 2023, gamma 5) or "p2" (Choi et
            al. 2022) for any prediction type; "truncated_snr" (Salimans & Ho 2022) for "sample" and "v_prediction".

    Raises:
        ValueError: an unknown loss or weighting; "hybrid" without a learned variance; a weighting with "vlb", which has its
            own; a noise_schedule with another loss, another number of timesteps or an analytic variance; "truncated_snr" with
            another prediction type. It gives x_0 its full weight at pure noise, where the squared error of x_0 is up to 4e8
            times that of epsilon (cosine schedule).
    """

    @checked_arguments(loss=LOSSES, vlb_weight="[0, 1000000]", weighting=(None, *WEIGHTINGS))
    def __init__(
        self,
        scheduler: VariationalDDPMScheduler,
        loss: str = "simple",
        vlb_weight: float = 0.001,
        weighting: str | None = None,
        noise_schedule: LearnedNoiseSchedule | None = None,
    ):
        if noise_schedule is not None:
            if loss != "vlb":
                raise ValueError(
                    f"loss={loss!r} cannot train a noise schedule: it is not a bound, and it is lowest where the noise is "
                    "easiest to predict; choose loss='vlb'"
                )
            _check_noise_schedule(scheduler, noise_schedule)
            scheduler = copy.deepcopy(scheduler)  # its betas change at each call
        if loss == "hybrid" and not scheduler.learns_variance:
            raise ValueError(
                f"loss='hybrid' trains a learned variance, but variance_type={scheduler.variance_type!r} is fixed; choose "
                "'learned_range' or loss='simple'"
            )
        if weighting is not None and loss == "vlb":
            raise ValueError(
                f"weighting={weighting!r} is for the mean squared error; loss='vlb' has weights of its own, leave weighting out"
            )
        if weighting == "truncated_snr" and scheduler.prediction_type not in BOUNDED_PREDICTIONS:
            raise ValueError(
                f"weighting='truncated_snr' is for prediction_type 'sample' or 'v_prediction'; this scheduler has "
                f"{scheduler.prediction_type!r}, whose errors it would multiply without bound at noisy timesteps; choose "
                "another prediction_type, or weighting 'min_snr' or 'p2'"
            )
        self.scheduler, self.loss, self.vlb_weight, self.weighting = scheduler, loss, vlb_weight, weighting
        self.weights = None if weighting is None else torch.from_numpy(_mse_weights(scheduler, weighting)).float()
        self.noise_schedule = noise_schedule
        self.end = len(scheduler.alphas_cumprod)  # T

    @property
    def times(self) -> torch.Tensor:
        """The timesteps of the chain, int64 (N,)."""
        return torch.tensor(self.scheduler.chain)

    def __call__(
        self,
        unet: Callable,
        x_start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of each image at its timestep.

        Args:
            unet: called as `unet(x_t, t, class_labels=..., return_dict=False)`; returns a tuple with the output first.
            x_start: images (B, C, H, W) in [-1, 1].
            class_labels: (B,), for a class-conditional network.
            t: int64 (B,), 0-based timesteps of the chain, on any device; None to draw them uniformly.
            noise: standard normal, of the shape of x_start; None to draw it.

        Returns:
            Losses (B,), in float32 or float64. The predicted x_0 is never clipped.
        """
        scheduler, steps = self.scheduler, len(self.scheduler.chain)
        if self.noise_schedule is not None:
            scheduler.use_betas(*self.noise_schedule.betas())
        if t is None:
            t = scheduler.draw_timesteps(len(x_start), x_start.device)
        t = t.to(x_start.device)
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = scheduler.q_sample(x_start, t, noise)
        c_noise = conditioning_times(scheduler, t)
        output = unet(x_t, c_noise, class_labels=class_labels, return_dict=False)[0]
        if self.loss == "vlb":
            term = steps * scheduler.vlb_term(output, x_start, x_t, t, clip_sample=False)
            return term if self.noise_schedule is None else term + scheduler.prior_bits_per_dim(x_start)
        prediction = output[:, : x_start.shape[1]]
        target = scheduler.prediction_target(x_start, x_t, noise, t)
        mse = ((target - prediction.to(target.dtype)) ** 2).flatten(1).mean(1)
        if self.weights is not None:
            self.weights = self.weights.to(mse.device)  # moved once
            mse = mse * self.weights[t]
        if self.loss == "simple":
            return mse
        frozen = torch.cat((prediction.detach(), output[:, x_start.shape[1] :]), dim=1)
        vlb = steps * scheduler.vlb_term(frozen, x_start, x_t, t, clip_sample=False)
        return mse + self.vlb_weight * vlb


class ContinuousBoundObjective:
    """The variational bound in continuous time (VDM, Kingma et al. 2021, eq. 11 to 18), with a learned noise schedule.

    Of the schedule, the bound depends on the end points alone, which are trained by its gradient. The curve between them does
    not change the mean of L, the loss without L_0 and L_T, and is trained to lower its variance (VDM appendix I.2): E[L^2] has
    the gradient E[2 L dL]. A hook multiplies the gradient of each image by 2 L where it enters the curve, so one backward pass
    trains both.

    The network is given the time, not gamma as in VDM, so that whole times are the timesteps of a chain. The gradient still is
    that of a network that is given gamma: the time is treated as a function of gamma along the present curve.

    L_0 is the discretized Gaussian (eq. 13 of Ho, Jain, Abbeel 2020) around x_t / scale at gamma_min, without the network. The
    decoder of VDM, a softmax over the grey levels, costs up to 0.11 bits/dim less if all levels are equally frequent.

    Args:
        scheduler: prediction type, grey levels and number of timesteps; its betas are not used.
        noise_schedule: the schedule to learn, on the device of the images.

    Raises:
        ValueError: a learned or analytic variance, or "previous" prediction, which continuous time does not have;
            num_train_timesteps that differ.
    """

    def __init__(self, scheduler: VariationalDDPMScheduler, noise_schedule: LearnedNoiseSchedule):
        for key, value, allowed in (
            ("variance_type", scheduler.variance_type, FIXED_VARIANCES),
            ("prediction_type", scheduler.prediction_type, ("epsilon", "sample", "v_prediction")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{key}={value!r} has no meaning in continuous time; choose one of {', '.join(allowed)}"
                )
        _check_noise_schedule(scheduler, noise_schedule)
        self.scheduler, self.noise_schedule = scheduler, noise_schedule
        self.end = noise_schedule.num_train_timesteps  # T

    @property
    def times(self) -> torch.Tensor:
        """Evenly spread times in [0, T - 1], float64 (T,)."""
        return (torch.arange(self.end, dtype=torch.float64) + 0.5) / self.end * (self.end - 1)

    def __call__(
        self,
        unet: Callable,
        x_start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of each image at its time.

        Args:
            unet, x_start, class_labels, noise: as in `DiffusionObjective`.
            t: (B,) in [0, T - 1], on any device: times, whole or fractional, which the network is given. None to draw them
                uniformly.

        Returns:
            Losses (B,) in bits/dim, in float32 or float64; their mean over t is the bound.

        Raises:
            ValueError: t is out of [0, T - 1]; checked on the CPU only.
        """
        last, device = self.end - 1, x_start.device
        if t is None:
            t, _ = FractionalTimesteps(self.scheduler).sample(len(x_start), device)
        t = t.to(device, finest_dtype(device))
        if device.type == "cpu" and not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"t={t.tolist()} must be in [0, {last}], the timesteps and numbers between them")
        noise = torch.randn_like(x_start) if noise is None else noise
        gamma_min, span = self.noise_schedule.start_and_span()
        rise, slope = self.noise_schedule.rise_and_slope(t / last)
        factor: torch.Tensor  # known before the backward pass
        if rise.requires_grad:
            for value in (rise, slope):
                value.register_hook(lambda gradient: gradient * factor)
        gamma = gamma_min + span * rise
        scale, std = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        x_t = broadcast(scale, x_start) * x_start + broadcast(std, x_start) * noise
        # t, with a gradient
        time = t + (gamma - gamma.detach()) * (last / (span * slope).detach())
        c_noise = conditioning_times(self.scheduler, time.to(x_start.dtype))
        output = in_working_precision(unet(x_t, c_noise, class_labels=class_labels, return_dict=False)[0])
        of_x_t, of_output = epsilon_weights(self.scheduler.prediction_type, scale, std)
        error = broadcast(of_x_t, x_t) * x_t + broadcast(of_output, x_t) * output - noise
        weight = (0.5 / math.log(2)) * span * slope
        diffusion = weight.to(error) * error.square().flatten(1).mean(1)
        factor = 2 * diffusion.detach().to(rise)
        return diffusion + self._prior_and_decoder(x_start, noise, gamma_min, gamma_min + span)

    def _prior_and_decoder(self, x_start, noise, gamma_min, gamma_max):
        """L_T + L_0, (B,) bits/dim."""
        zero, log_scale = x_start.new_zeros(()), (gamma_min / 2).to(x_start)
        mean, log_variance = torch.sigmoid(-gamma_max).sqrt().to(x_start) * x_start, F.logsigmoid(gamma_max).to(x_start)
        prior = gaussian_kl(mean, log_variance, zero, zero)
        noisy = x_start + log_scale.exp() * noise
        decoder = -discretized_gaussian_log_likelihood(x_start, noisy, log_scale, self.scheduler.levels)
        return nats_to_bits_per_dim(prior + decoder)


class ScoreObjective:
    """Denoising score matching in continuous time (Score-SDE eq. 7).

    Args:
        sde: the process.
        weighting: "variance", lambda = std^2, is the mean squared error of the predicted noise, like "simple" of
            `DiffusionObjective`. "likelihood", lambda = g^2, bounds the negative log-likelihood (Song et al. 2021, "ScoreFlow",
            theorem 1): half the mean loss over t in [0, 1], times the number of dimensions, is the bound in nats up to terms
            that do not depend on the network.

    Raises:
        ValueError: an unknown weighting.
    """

    @checked_arguments(weighting=SCORE_WEIGHTINGS)
    def __init__(self, sde: SDE, weighting: str = "variance"):
        self.sde, self.weighting = sde, weighting

    end = 1.0  # the time of pure noise

    @property
    def times(self) -> torch.Tensor:
        """Evenly spread times at which to compare losses, float64 (N,)."""
        t_min = self.sde.t_min
        return t_min + (1 - t_min) * (torch.arange(self.sde.N, dtype=torch.float64) + 0.5) / self.sde.N

    def __call__(
        self,
        unet: Callable,
        x_start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of each image at its time.

        Args:
            unet, x_start, class_labels, noise: as in `DiffusionObjective`; unet gets conditioning times of the process for t.
            t: (B,) in (0, 1], on any device; None to draw them uniformly from [t_min, 1].

        Returns:
            Losses (B,), in float32 or float64.
        """
        sde = self.sde
        if t is None:
            t, _ = ContinuousTimes(sde).sample(len(x_start), x_start.device)
        t = sde.trained_times(t.to(x_start.device, finest_dtype(x_start.device)))
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = sde.sample(x_start, t, noise)
        output = unet(x_t, sde.conditioning_times(t).to(x_start.dtype), class_labels=class_labels, return_dict=False)[0]
        output = in_working_precision(output[:, : x_start.shape[1]])
        weights = epsilon_weights(sde.prediction_type, sde.scale(t), sde.std(t))
        of_x_t, of_output = (broadcast(weight, output) for weight in weights)
        loss = (of_x_t * x_t + of_output * output - noise).square().flatten(1).mean(1)
        return loss * (sde.diffusion(t) / sde.std(t)).square().to(loss) if self.weighting == "likelihood" else loss


def drop_labels(class_labels: torch.Tensor, null_class: int, probability: float) -> torch.Tensor:
    """Replace class labels (B,) by `null_class` with a probability, for classifier-free guidance (Ho & Salimans 2021)."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(dropped, null_class)


def _check_noise_schedule(scheduler, noise_schedule):
    """Raise ValueError for a process that cannot have the betas of a noise schedule."""
    T = scheduler.config.num_train_timesteps
    if noise_schedule.num_train_timesteps != T:
        raise ValueError(
            f"noise_schedule has num_train_timesteps={noise_schedule.num_train_timesteps}, the scheduler {T}; give both the "
            "same"
        )
    if scheduler.variance_type == "analytic":
        raise ValueError(
            "variance_type='analytic' needs fixed betas; learn the betas with another variance_type, then run optimize-chain"
        )


def _mse_weights(scheduler, weighting):
    """The weight of the mean squared error of the network's output at each timestep, float64 (T,); NaN outside the chain."""
    chain = np.array(scheduler.chain)
    abar = scheduler.alphas_cumprod.numpy()[chain]
    before = np.append(1.0, abar[:-1])
    scale, std = np.sqrt(np.maximum(abar, 1e-24)), np.sqrt(1 - abar)
    posterior = posterior_mean_weights(abar, before, 1 - abar / before)
    _, of_output = x_start_weights(scheduler.prediction_type, scale, std, posterior)
    weights = np.full(len(scheduler.alphas_cumprod), np.nan)
    # the squared error of x_0 is of_output^2 times that of the output
    weights[chain] = WEIGHTINGS[weighting]((scale / std) ** 2) * of_output**2
    return weights
