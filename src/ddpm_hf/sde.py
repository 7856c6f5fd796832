"""Diffusion in continuous time (Song et al. 2020, "Score-SDE"): the processes, and their samplers as diffusers schedulers.

One self-contained file. A process is a linear SDE dx = f(t) x dt + g(t) dw on t in [0, 1], so that x_t given x_0 is
N(scale(t) x_0, std(t)^2). Equation numbers are those of Score-SDE. Coefficients are float64.
"""

import math
from numbers import Integral

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .arguments import check_argument, checked_arguments, shown
from .saved import GuardedConfig

SDE_PREDICTIONS = ("epsilon", "score", "sample", "v_prediction")
PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow", "ddim", "none")
CORRECTORS = ("langevin", "annealed_langevin")
# Of the processes and their schedulers; of beta_min and beta_max see `VPSDE`, too.
SDE_RANGES = {
    "N": "[1, 100000]",
    "num_train_timesteps": "[1, 100000]",
    "beta_min": "(0, 150]",
    "beta_max": "(0, 300]",
    "sigma_min": "[0.000001, 1000000]",
    "sigma_max": "[0.000001, 1000000]",
    "sampling_eps": "(0, 1)",
    "predictor": PREDICTORS,
    "corrector": CORRECTORS,
    "correct_steps": "[0, 10000]",
    "snr": "(0, 100]",
    "prediction_type": SDE_PREDICTIONS,
    "trained_betas": "(0, 1]",
    "levels": "[2, 16777216]",
}


class SDE:
    """What all processes (VPSDE, SubVPSDE, VESDE, ChainSDE) have in common.

    Times t are floats or float tensors (), (B,) in [0, 1]; coefficients float64 tensors of the shape of t; images (B, C, H, W).

    Args:
        N: steps of the discretization by `discretize`; the times given to networks of VP are counted in these steps, too.
        prediction_type: what the network gives: "epsilon", "score", "sample" or "v_prediction".

    Attributes:
        prior_std: of the normal distribution at t = 1, with mean 0.
        least: the time that stands for data.
    """

    prior_std = 1.0
    least = 1e-5

    @checked_arguments(**SDE_RANGES)
    def __init__(self, N: int, prediction_type: str):
        self.N, self.prediction_type = N, prediction_type

    # each process has its own

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """log of what x_0 is multiplied by in the mean of x_t."""
        raise NotImplementedError

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        """The standard deviation of x_t given x_0."""
        raise NotImplementedError

    def rate(self, t: torch.Tensor | float) -> torch.Tensor:
        """f: the drift is f(t) x."""
        raise NotImplementedError

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        """g."""
        raise NotImplementedError

    def labels(self, t: torch.Tensor | float) -> torch.Tensor:
        """What the network is told at t, in the place of its timestep."""
        raise NotImplementedError

    def times(self, labels: torch.Tensor | float) -> torch.Tensor:
        """The t of `labels`."""
        raise NotImplementedError

    def discrete(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, G) of the discretization x_{k+1} = (1 + F) x_k + G z; Euler and Maruyama's if a process has none of its own."""
        return self.rate(t) / self.N, self.diffusion(t) / self.N**0.5

    # and this follows from it

    def index(self, t: torch.Tensor | float) -> torch.Tensor:
        """k = floor(t (N - 1)), int64: the step of the discretization at t."""
        return (_double(t) * (self.N - 1)).long()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """What x_0 is multiplied by in the mean of x_t."""
        return self.log_scale(t).exp()

    def drift(self, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """f(t) x, (B, C, H, W)."""
        return _like(self.rate(t), x_t) * x_t

    def marginal(self, x_start: torch.Tensor, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, C, H, W) and standard deviation, of the shape of t, of x_t given x_0 (eq. 29)."""
        return _like(self.scale(t), x_start) * x_start, self.std(t)

    def sample(self, x_start: torch.Tensor, t: torch.Tensor | float, noise: torch.Tensor) -> torch.Tensor:
        """x_t (B, C, H, W) of x_0 and standard normal noise."""
        mean, std = self.marginal(x_start, t)
        return mean + _like(std, x_start) * noise

    def discretize(self, x_t: torch.Tensor, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """f (B, C, H, W) and G, of the shape of t, of x_{k+1} = x_k + f + G z."""
        F, G = self.discrete(t)
        return _like(F, x_t) * x_t, G

    def reverse_drift(
        self, x_t: torch.Tensor, t: torch.Tensor | float, score: torch.Tensor, probability_flow: bool = False
    ) -> torch.Tensor:
        """The drift of the reverse SDE (eq. 6), or of the ODE with the same marginals (eq. 13), at a score (B, C, H, W)."""
        share = 0.5 if probability_flow else 1.0
        return self.drift(x_t, t) - _like(share * self.diffusion(t) ** 2, x_t) * score

    def reverse_discretize(
        self, x_t: torch.Tensor, t: torch.Tensor | float, score: torch.Tensor, probability_flow: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f and G of x_k = x_{k+1} - f + G z (eq. 46), or with G = 0 of the ODE."""
        f, G = self.discretize(x_t, t)
        share = 0.5 if probability_flow else 1.0
        return f - _like(share * G**2, x_t) * score, torch.zeros_like(G) if probability_flow else G

    def score(self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The gradient of log p(x_t) by x_t, from the network's output at (x_t, labels(t)), (B, C, H, W)."""
        of_x_t, of_output = self.score_weights(t)
        return _like(of_x_t, x_t) * x_t + _like(of_output, x_t) * model_output

    def score_weights(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """What x_t and the network's output count in the score; of the shape of t."""
        std, scale = self.std(t), self.scale(t)
        if self.prediction_type == "score":
            return torch.zeros_like(std), torch.ones_like(std)
        if self.prediction_type == "epsilon":
            return torch.zeros_like(std), -1 / std
        if self.prediction_type == "sample":
            return -1 / std**2, scale / std**2
        total = scale**2 + std**2  # v = scale * epsilon - std * x_0
        return -1 / total, -scale / (std * total)

    def prior_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log of the density of z (B, C, H, W) at t = 1, (B,) nats, summed over the dimensions."""
        z = _double(z.flatten(1)) / self.prior_std
        return -0.5 * (z**2).sum(1) - z.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))


class VPSDE(SDE):
    """Variance preserving: the continuous limit of the DDPM chain with betas from beta_min / N to beta_max / N (eq. 11, 32).

    Networks are told t (N - 1), as those of N discrete timesteps are.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or their sum is above 300.
    """

    @checked_arguments(**SDE_RANGES)
    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, N: int = 1000, prediction_type: str = "epsilon"):
        super().__init__(N, prediction_type)
        if beta_min > beta_max:
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: must be 0 < beta_min <= beta_max")
        if beta_min + beta_max > 300:  # x_1 would have less than 1e-32 of x_0, beyond float32
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: their sum must be 300 at most")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t):
        """beta(t), per unit of t."""
        return self.beta_min + _double(t) * (self.beta_max - self.beta_min)

    def log_scale(self, t):
        t = _double(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def std(self, t):
        return torch.sqrt(-torch.expm1(2 * self.log_scale(t)))

    def rate(self, t):
        return -0.5 * self.beta(t)

    def diffusion(self, t):
        return torch.sqrt(self.beta(t))

    def step_beta(self, t: torch.Tensor | float) -> torch.Tensor:
        """The beta of the discretization's step at t: of N from beta_min / N to beta_max / N."""
        share = _double(self.index(t)) / max(self.N - 1, 1)
        return (self.beta_min + share * (self.beta_max - self.beta_min)) / self.N

    def discrete(self, t):
        beta = self.step_beta(t)
        return torch.expm1(0.5 * torch.log1p(-beta)), torch.sqrt(beta)

    def labels(self, t):
        return _double(t) * (self.N - 1)

    def times(self, labels):
        return _double(labels) / max(self.N - 1, 1)


class ChainSDE(VPSDE):
    """The VP process through a discrete chain's levels of noise: its alphas_cumprod at t = (k + 1) / T, k = 0 .. T - 1.

    Between them, and to 1 at t = 0, log(alphas_cumprod) is a monotone cubic (Fritsch & Carlson 1980). Networks are told
    t T - 1, which their sinusoidal embedding takes between two timesteps as well. Data are at t = 1 / T at the least.

    Args:
        alphas_cumprod: (T,), float64 for its full use.
        prediction_type: as of the chain; "previous" has no score between timesteps.

    Raises:
        ValueError: an alphas_cumprod that does not fall, or reaches 0.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon"):
        abar = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        SDE.__init__(self, len(abar), prediction_type)
        self.least = 1 / self.N
        if not (abar.min() > 0 and (torch.diff(abar, prepend=torch.ones(1)) < 0).all()):
            raise ValueError("alphas_cumprod must fall and stay above 0: of zero SNR there is no way back")
        knots = torch.cat((torch.zeros(1, dtype=torch.float64), 0.5 * abar.log()))
        rise = torch.diff(knots)
        slope = 2 * rise[1:] * rise[:-1] / (rise[1:] + rise[:-1])  # the harmonic mean overshoots nowhere
        first, last = torch.cat((rise[:1], slope)), torch.cat((slope, rise[-1:]))
        # (N, 4), a cubic for each interval; by device, each moved there once
        self.cubics = torch.stack((knots[:-1], first, 3 * rise - 2 * first - last, first + last - 2 * rise), dim=1)
        self.cubics_on = {}

    def _piece(self, t):
        """Where t is in its interval, 0 to 1, and the cubic's coefficients there: value, slope, and the next two."""
        at = _double(t) * self.N
        k = at.long().clamp(0, self.N - 1)
        if at.device not in self.cubics_on:
            with torch.inference_mode(False):
                self.cubics_on[at.device] = self.cubics.to(at.device, at.dtype)
        return at - k, *self.cubics_on[at.device][k].unbind(-1)

    def log_scale(self, t):
        u, a, b, c, d = self._piece(t)
        return a + u * (b + u * (c + u * d))

    def beta(self, t):
        u, _, b, c, d = self._piece(t)
        return -2 * (b + u * (2 * c + u * 3 * d)) * self.N

    def step_beta(self, t):
        before = (_double(t) - 1 / self.N).clamp(min=0.0)
        return -torch.expm1(2 * (self.log_scale(t) - self.log_scale(before)))

    def labels(self, t):
        return _double(t) * self.N - 1

    def times(self, labels):
        return (_double(labels) + 1) / self.N


class SubVPSDE(VPSDE):
    """Sub-variance preserving: the drift of `VPSDE`, and never more variance (eq. 12, 34)."""

    def std(self, t):
        return -torch.expm1(2 * self.log_scale(t))

    def diffusion(self, t):
        return torch.sqrt(-self.beta(t) * torch.expm1(4 * self.log_scale(t)))

    def discrete(self, t):
        return SDE.discrete(self, t)


class VESDE(SDE):
    """Variance exploding: noise of standard deviation sigma_min (sigma_max / sigma_min)^t, of NCSN (eq. 9, 30).

    Networks are told sigma(t). At t = 0 the variance is sigma_min^2, as in the paper's code.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    @checked_arguments(**SDE_RANGES)
    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, N: int = 1000, prediction_type: str = "score"):
        super().__init__(N, prediction_type)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: must be 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max
        self.log_ratio = math.log(sigma_max / sigma_min)

    def log_scale(self, t):
        return torch.zeros_like(_double(t))

    def std(self, t):
        return self.sigma_min * torch.exp(_double(t) * self.log_ratio)

    def rate(self, t):
        return torch.zeros_like(_double(t))

    def diffusion(self, t):
        return self.std(t) * math.sqrt(2 * self.log_ratio)

    def discrete(self, t):
        k = _double(self.index(t))
        ratio = math.exp(2 * self.log_ratio / max(self.N - 1, 1))  # of two variances in a row
        variance = self.std(k / max(self.N - 1, 1)) ** 2
        G = torch.sqrt(torch.where(k > 0, variance * (1 - 1 / ratio), variance))
        return torch.zeros_like(G), G

    def labels(self, t):
        return self.std(t)

    def times(self, labels):
        return torch.log(_double(labels) / self.sigma_min) / self.log_ratio


class SDEScheduler(GuardedConfig, SchedulerMixin, ConfigMixin):
    """The reverse of an SDE as a diffusers scheduler: a predictor from each time to the next, correctors before it.

    `timesteps` are what the network is told, so that pipelines need to know nothing of the process: t (N - 1) for VP and
    sub-VP, sigma for VE. Times run from 1 down to `sampling_eps` evenly; each step goes to the next one by the process's own
    transition between the two, the last to data: it returns the mean, without noise. `step` makes one network output one
    predictor step; `DDPMImagePipeline` calls the network anew for each of the `correct_steps` corrector steps before it
    (Algorithms 2 and 3), which other pipelines leave out.

    Args, of `VPSDEScheduler`, `SubVPSDEScheduler` and `VESDEScheduler`:
        num_train_timesteps: N of the process: the range of timesteps that the network knows.
        beta_min, beta_max, or sigma_min, sigma_max: of the process.
        sampling_eps: the time at which sampling ends, above 0.
        predictor: "reverse_diffusion" (eq. 46), "ancestral" (appendix F; DDPM's own steps, and NCSN's; not of sub-VP),
            "euler_maruyama", "probability_flow" (the ODE by the steps of reverse diffusion, without noise), "ddim" (the ODE in
            DDIM's form, eq. 13 there, exact where the predicted noise does not change), "none". The two that take steps of
            Euler are refused where a step's beta is 0.9 or more: in few steps, and at the noisy end of cosine chains.
        corrector: "langevin" (Algorithms 4 and 5, each image with norms of its own), "annealed_langevin" (NCSN: steps of
            (snr * std)^2; with predictor "none" its whole sampler).
        correct_steps: corrector steps at each time.
        snr: signal-to-noise ratio r of a corrector step.
        prediction_type: what the network gives: "epsilon", "score", "sample" or "v_prediction".
        levels: grey levels of the data, 256 for 8 bits.
        clip_sample: whether predictor steps, and the ODE of `flow`, are of the predicted x_0 clipped to [-1, 1], as a DDPM's.
            At the noisy end of a cosine chain the ODE multiplies the network's error by thousands otherwise; of a DDPM's config
            it is the DDPM's.

    `from_config` takes the configs of diffusers' ScoreSdeVeScheduler and ScoreSdeVpScheduler, and of a DDPM: the linear
    schedule becomes beta_min = T beta_start, beta_max = T beta_end; any other is for VP alone, as `ChainSDE` through its betas.

    Raises:
        ValueError: a value that is not supported, named.
    """

    _compatibles = ["DDPMScheduler", "ScoreSdeVeScheduler"]  # their keys stay in the config, for the way back
    order = 1
    init_noise_sigma = 1.0

    def _build(self, sde):
        config = self.config
        if config.predictor == "ancestral" and type(self).__name__ == "SubVPSDEScheduler":
            raise ValueError("predictor='ancestral' is of VP and VE; choose 'reverse_diffusion' or 'euler_maruyama'")
        if config.predictor == "none" and config.correct_steps == 0:
            raise ValueError("predictor='none' with correct_steps=0 does nothing; give correct_steps")
        self.sde, self.init_noise_sigma, self.levels = sde, sde.prior_std, config.levels
        self.timesteps, self.num_inference_steps = None, None
        self._position, self._tables = {}, {}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets `timesteps`, float32 on the CPU or `device`, and what each step multiplies by.

        Raises:
            ValueError: fewer steps than 2, or than the predictor can do with.
        """
        if not (isinstance(num_inference_steps, Integral) and num_inference_steps >= 2):
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer, 2 or more")
        n, config, sde = int(num_inference_steps), self.config, self.sde
        t = torch.linspace(1.0, max(config.sampling_eps, sde.least), n, dtype=torch.float64)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        # each step goes to the next time, the last one to data; x_t given x at the next time is N(ratio x, G^2)
        at = t
        # NCSN's sigmas go to t = 0, what it tells the network to sampling_eps
        if isinstance(sde, VESDE) and config.sampling_eps <= 1e-5:
            at = torch.linspace(1.0, 0.0, n, dtype=torch.float64)
        scale, std = torch.cat((sde.scale(at), one[:1])), torch.cat((sde.std(at), zero[:1]))
        scale, std, next_scale, next_std = scale[:-1], std[:-1], scale[1:], std[1:]
        ratio = scale / next_scale
        G2 = std**2 - (ratio * next_std) ** 2
        if config.predictor in ("euler_maruyama", "probability_flow") and ratio.square().min() < 0.1:
            raise ValueError(
                f"num_inference_steps={n} has a beta of {1 - ratio.square().min():.3f}, and predictor={config.predictor!r} "
                "takes steps of Euler, for betas below 0.9; give more steps, or choose predictor='ddim'"
            )
        if config.predictor == "reverse_diffusion":
            of_x_t, of_score, of_noise = 2 - ratio, G2, G2.sqrt()
        elif config.predictor == "probability_flow":
            of_x_t, of_score, of_noise = 2 - ratio, 0.5 * G2, zero
        elif config.predictor == "euler_maruyama":
            step = -torch.diff(t, append=zero[:1])
            g2 = sde.diffusion(t) ** 2 * step
            of_x_t, of_score, of_noise = 1 - sde.rate(t) * step, g2, g2.sqrt()
        elif config.predictor == "ancestral":  # of NCSN with the posterior's variance, of DDPM with beta
            variance = G2 * (next_std / std) ** 2 if isinstance(sde, VESDE) else G2
            of_x_t, of_score, of_noise = 1 / ratio, G2 / ratio, variance.sqrt()
        elif config.predictor == "ddim":  # x_0 and epsilon stay, t goes on; after the last step x_0
            of_x_t = 1 / ratio
            of_score, of_noise = std**2 / ratio - next_std * std, zero
        else:
            of_x_t, of_score, of_noise = one, zero, zero
        from_x_t, from_output = sde.score_weights(t)
        before = (t - 1 / sde.N).clamp(min=0.0)
        alpha = (2 * (sde.log_scale(t) - sde.log_scale(before))).exp()  # of correctors, Algorithm 5
        columns = {
            # of x_t and x_0: the score is (scale x_0 - x_t) / std^2
            "step": (of_x_t - of_score / std**2, of_score * scale / std**2, of_noise),
            "x_start": ((1 + std**2 * from_x_t) / scale, std**2 * from_output / scale),
            "score": (from_x_t, from_output),
            "correct": (alpha, std),
        }
        self._tables = {name: list(zip(*(column.tolist() for column in each))) for name, each in columns.items()}
        labels = sde.labels(t).float()
        self.timesteps, self.num_inference_steps = labels.to(device), n
        self._position = {label: i for i, label in enumerate(labels.tolist())}
        if len(self._position) < n:
            raise ValueError(f"num_inference_steps={n}: some have one timestep of {sde.N}; give fewer")

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The network's input is the sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """A predictor step to the next time.

        Args:
            model_output: of the network at (sample, timestep), (B, C, H, W).
            timestep: one of `timesteps`.
            sample: (B, C, H, W).
            generator: one, or a list with one for each image.
            return_dict: False for a tuple (prev_sample, pred_original_sample).
            variance_noise: standard normal noise to use in place of drawing it.

        Returns:
            `DDPMSchedulerOutput`, of the dtype of sample; `.pred_original_sample` is E[x_0 | x_t] by the network (Tweedie).

        Raises:
            ValueError: a timestep that is not of `timesteps`; before `set_timesteps`.
        """
        i = self._index(timestep)
        x, output = _in_float32(sample, model_output)
        of_x_t, of_output = self._tables["x_start"][i]
        x_start = (x * of_x_t).add_(output, alpha=of_output)
        if self.config.clip_sample:
            x_start.clamp_(*clip_limits(self.config))
        of_x_t, of_x_start, of_noise = self._tables["step"][i]
        prev_sample = (x * of_x_t).add_(x_start, alpha=of_x_start)
        if of_noise != 0 and i + 1 < self.num_inference_steps:
            noise = _noise(x, generator) if variance_noise is None else variance_noise.to(x.dtype)
            prev_sample.add_(noise, alpha=of_noise)
        prev_sample, x_start = prev_sample.to(sample.dtype), x_start.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample, x_start) if return_dict else (prev_sample, x_start)

    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A step of Langevin dynamics at the same time; arguments as of `step`. Returns the sample, (B, C, H, W)."""
        i = self._index(timestep)
        x, output = _in_float32(sample, model_output)
        of_x_t, of_output = self._tables["score"][i]
        score = (x * of_x_t).add_(output, alpha=of_output)
        noise = _noise(x, generator) if variance_noise is None else variance_noise.to(x.dtype)
        alpha, std = self._tables["correct"][i]
        if self.config.corrector == "langevin":
            norm = score.flatten(1).norm(dim=1)
            ratio = torch.where(norm > 0, noise.flatten(1).norm(dim=1) / norm, 0.0)  # no score, no step
            size = 2 * alpha * (self.config.snr * ratio).square().view(-1, *[1] * (x.dim() - 1))
        else:
            size = torch.full_like(x[:1, :1, :1, :1], 2 * alpha * (self.config.snr * std) ** 2)
        return (x + size * score + (2 * size).sqrt() * noise).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """x_t (B, C, H, W) of x_0 and standard normal noise at timesteps (B,), which may lie between those of `timesteps`."""
        return self.sde.sample(original_samples, self.sde.times(timesteps), noise)

    def _index(self, timestep):
        if self.timesteps is None:
            raise ValueError("set_timesteps(num_inference_steps) comes before the first step")
        at = float(timestep)
        if at not in self._position:
            raise ValueError(f"timestep={at} is none of the {self.num_inference_steps} in `timesteps`")
        return self._position[at]

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """diffusers' hook of `from_config`: a DDPM's linear schedule in terms of the process."""
        config_dict = dict(config_dict)
        own_keys = check_argument("_ddpm_hf", config_dict.get("_ddpm_hf") or {}, dict)
        if "levels" in own_keys:
            config_dict.setdefault("levels", own_keys["levels"])
        variance_exploding = cls.__name__ == "VESDEScheduler"
        if "predictor" not in config_dict:  # of another class, whose defaults are not ours
            config_dict["_use_default_values"] = []
            if variance_exploding and "sigma_min" in config_dict:  # ScoreSdeVeScheduler's
                config_dict.setdefault("centered", False)
        own = {"beta_min", "sigma_min"} & set(config_dict)
        if own == {"beta_min" if variance_exploding else "sigma_min"}:
            raise ValueError(f"{cls.__name__} cannot be built from a config with {own.pop()}")
        if {"beta_start", "beta_schedule"} & set(config_dict) and not own:
            schedule, T = config_dict.get("beta_schedule", "linear"), config_dict.get("num_train_timesteps", 1000)
            T = check_argument("num_train_timesteps", T, int, SDE_RANGES["N"])
            # the betas of a schedule by name are there for classes that do not know it
            by_name = schedule == "linear_scaled_by_T" and "trained_betas" in own_keys
            linear = schedule == "linear" and config_dict.get("trained_betas") is None
            if (by_name or linear) and not config_dict.get("rescale_betas_zero_snr"):
                factor = 1000 if by_name else T
                first, last = (  # diffusers' own
                    check_argument(key, config_dict.get(key, default), float, "(0, 1]")
                    for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))
                )
                config_dict |= {"beta_min": first * factor, "beta_max": last * factor, "trained_betas": None}
            elif cls.__name__ == "VPSDEScheduler":
                config_dict["trained_betas"] = DDPMScheduler.from_config(config_dict).betas.tolist()
            if variance_exploding or (cls.__name__ != "VPSDEScheduler" and "beta_min" not in config_dict):
                raise ValueError(
                    f"{cls.__name__} has no process for beta_schedule={schedule!r}; VP has for every one, sub-VP for 'linear'"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class VPSDEScheduler(SDEScheduler):
    """Samplers of `VPSDE`, or with `trained_betas`, those of a discrete chain, of `ChainSDE`; see `SDEScheduler`."""

    @checked_arguments(**SDE_RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sampling_eps: float = 1e-3,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        correct_steps: int = 0,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        trained_betas: list[float] | None = None,
        levels: int = 256,
        clip_sample: bool = False,
    ):
        if trained_betas is not None:
            if self._sde is not VPSDE or not 1 <= len(trained_betas) <= 100_000:
                raise ValueError(
                    f"trained_betas={shown(trained_betas)}: give betas to VPSDEScheduler alone, 1 to 100,000"
                )
            num_train_timesteps = len(trained_betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps, trained_betas=list(trained_betas))
            alphas_cumprod = torch.cumprod(1 - torch.tensor(trained_betas, dtype=torch.float64), dim=0)
            try:
                sde = ChainSDE(alphas_cumprod, prediction_type)
            except ValueError as error:
                raise ValueError(f"trained_betas={shown(trained_betas)}: {error}") from None
        else:
            sde = self._sde(beta_min, beta_max, num_train_timesteps, prediction_type)
        self._build(sde)

    _sde = VPSDE


class SubVPSDEScheduler(VPSDEScheduler):
    """Samplers of `SubVPSDE`; see `SDEScheduler`."""

    _sde = SubVPSDE


class VESDEScheduler(SDEScheduler):
    """Samplers of `VESDE`; see `SDEScheduler`.

    Args beyond its own:
        centered: whether the images are in [-1, 1]; False for [0, 1], as NCSN's and those of diffusers' ScoreSdeVeScheduler.
    """

    @checked_arguments(**SDE_RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        sampling_eps: float = 1e-5,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        correct_steps: int = 1,
        snr: float = 0.16,
        prediction_type: str = "score",
        centered: bool = True,
        levels: int = 256,
        clip_sample: bool = False,
    ):
        self._build(VESDE(sigma_min, sigma_max, num_train_timesteps, prediction_type))


def clip_limits(config: dict) -> tuple[float, float]:
    """What a scheduler of this config clips the predicted x_0 to: +-`clip_sample_range`, or from 0 if not `centered`."""
    most = config.get("clip_sample_range", 1.0)
    return -most if config.get("centered", True) else 0.0, most


def finest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def _double(t):
    return t.to(finest_dtype(t.device)) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)


def _like(coefficient, x):
    """() or (B,) -> what multiplies images x."""
    coefficient = coefficient.to(x.device, x.dtype)
    return coefficient if coefficient.dim() == 0 else coefficient.view(-1, *[1] * (x.dim() - 1))


def _in_float32(*tensors):
    """Half precision is computed in float32; all have the dtype of the first."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _noise(x, generator):
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
