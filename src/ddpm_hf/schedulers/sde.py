"""Diffusion processes in continuous time (Song et al. 2020, "Score-SDE"): the SDEs VP, sub-VP and VE, and a chain as one.

Equation numbers are those of Score-SDE. A process is dx = f(t) x dt + g(t) dw, from data at t = 0 to noise at t = 1.
"""

import math

import torch

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.precision import finest_dtype
from ddpm_hf.schedulers.prediction import SDE_PREDICTIONS, score_weights

PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama", "probability_flow", "ddim", "none")


CORRECTORS = ("langevin", "annealed_langevin")


CONDITIONINGS = ("sigma", "level_index")  # of VE


# Ranges of the arguments of the processes and of their schedulers; `VPSDE` restricts beta_min and beta_max further.
SDE_RANGES: dict[str, str | tuple] = {
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
    "conditioning": CONDITIONINGS,
}


class SDE:
    """The base class of all processes: `VPSDE`, `SubVPSDE`, `VESDE`, `ChainSDE`.

    Times t are floats, or float tensors () or (B,), in [0, 1]. Coefficients are float64 tensors of the shape of t. Images have
    the shape (B, C, H, W).

    Args:
        N: number of steps of the discretization, `discretize`. The conditioning times of VP are counted in these steps.
        prediction_type: the meaning of the network's output: "epsilon", "score", "sample" or "v_prediction".

    Attributes:
        prior_std: standard deviation of the normal distribution at t = 1, whose mean is 0.
        t_min: the time at which x_t is taken for data.
        time_embedding_type: the embedding of a network that is made for the process's conditioning times.
        has_levels: whether networks know N discrete noise levels only.
    """

    prior_std = 1.0
    time_embedding_type = "positional"
    has_levels = False
    t_min = 1e-5

    @checked_arguments(**SDE_RANGES)
    def __init__(self, N: int, prediction_type: str):
        self.N, self.prediction_type = N, prediction_type

    # defined by each process

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """Logarithm of `scale`."""
        raise NotImplementedError

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        """The standard deviation of x_t given x_0."""
        raise NotImplementedError

    def drift_coefficient(self, t: torch.Tensor | float) -> torch.Tensor:
        """f(t); the drift is f(t) x."""
        raise NotImplementedError

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        """g(t), the diffusion coefficient."""
        raise NotImplementedError

    def conditioning_times(self, t: torch.Tensor | float) -> torch.Tensor:
        """The network's input at t, in place of a timestep."""
        raise NotImplementedError

    def times(self, conditioning_times: torch.Tensor | float) -> torch.Tensor:
        """The inverse of `conditioning_times`."""
        raise NotImplementedError

    def trained_times(self, t: torch.Tensor) -> torch.Tensor:
        """The times nearest to t at which networks are trained: t itself, except for discrete noise levels."""
        return t

    def discrete(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """F and G of the discretization x_{k+1} = (1 + F) x_k + G z, by default that of Euler and Maruyama."""
        return self.drift_coefficient(t) / self.N, self.diffusion(t) / self.N**0.5

    # derived from these

    def index(self, t: torch.Tensor | float) -> torch.Tensor:
        """The step of the discretization at t, k = floor(t (N - 1)), int64."""
        return (_to_float64(t) * (self.N - 1)).long()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """The factor of x_0 in the mean of x_t."""
        return self.log_scale(t).exp()

    def drift(self, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The drift f(t) x, (B, C, H, W)."""
        return broadcast(self.drift_coefficient(t), x_t) * x_t

    def marginal(self, x_start: torch.Tensor, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, C, H, W) and standard deviation (shape of t) of x_t given x_0 (eq. 29)."""
        return broadcast(self.scale(t), x_start) * x_start, self.std(t)

    def sample(self, x_start: torch.Tensor, t: torch.Tensor | float, noise: torch.Tensor) -> torch.Tensor:
        """x_t (B, C, H, W) from x_0 and standard normal noise."""
        mean, std = self.marginal(x_start, t)
        return mean + broadcast(std, x_start) * noise

    def discretize(self, x_t: torch.Tensor, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """f (B, C, H, W) and G (shape of t) in x_{k+1} = x_k + f + G z."""
        F, G = self.discrete(t)
        return broadcast(F, x_t) * x_t, G

    def reverse_drift(
        self, x_t: torch.Tensor, t: torch.Tensor | float, score: torch.Tensor, probability_flow: bool = False
    ) -> torch.Tensor:
        """The drift (B, C, H, W) of the reverse SDE (eq. 6), or of the ODE with the same marginals (eq. 13), for a score."""
        share = 0.5 if probability_flow else 1.0
        return self.drift(x_t, t) - broadcast(share * self.diffusion(t) ** 2, x_t) * score

    def reverse_discretize(
        self, x_t: torch.Tensor, t: torch.Tensor | float, score: torch.Tensor, probability_flow: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f and G in x_k = x_{k+1} - f + G z (eq. 46); for the ODE, G is 0."""
        f, G = self.discretize(x_t, t)
        share = 0.5 if probability_flow else 1.0
        return f - broadcast(share * G**2, x_t) * score, torch.zeros_like(G) if probability_flow else G

    def score(self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The gradient of log p(x_t) with respect to x_t, (B, C, H, W).

        model_output: the network's output at (x_t, conditioning_times(t)).
        """
        of_x_t, of_output = self.score_weights(t)
        return broadcast(of_x_t, x_t) * x_t + broadcast(of_output, x_t) * model_output

    def score_weights(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of x_t and of the network's output in the score; each has the shape of t."""
        return score_weights(self.prediction_type, self.scale(t), self.std(t))

    def prior_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of z (B, C, H, W) at t = 1, summed over the dimensions: (B,) nats."""
        z = _to_float64(z.flatten(1)) / self.prior_std
        return -0.5 * (z**2).sum(1) - z.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))


class VPSDE(SDE):
    """Variance preserving SDE: the continuous limit of the DDPM chain with betas from beta_min / N to beta_max / N.

    Eq. 11 and 32. The conditioning times are t (N - 1), in [0, N - 1] like the timesteps of a chain; with rescale_timesteps
    they are multiplied by 1000 / N, see `conditioning_times`.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or their sum is above 300.
    """

    short_name = "VP"

    @checked_arguments(**SDE_RANGES)
    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        N: int = 1000,
        prediction_type: str = "epsilon",
        rescale_timesteps: bool = False,
    ):
        super().__init__(N, prediction_type)
        self.time_scale = 1000 / N if rescale_timesteps else 1.0
        if beta_min > beta_max:
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: must be 0 < beta_min <= beta_max")
        if beta_min + beta_max > 300:  # x_1 would have less than 1e-32 of x_0, beyond float32
            raise ValueError(f"beta_min={beta_min}, beta_max={beta_max}: their sum must be 300 at most")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        """beta(t), the rate per unit of t at which the variance is replaced by noise."""
        return self.beta_min + _to_float64(t) * (self.beta_max - self.beta_min)

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        u = _to_float64(t)
        return -(u**2) * (self.beta_max - self.beta_min) / 4 - u * self.beta_min / 2

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_scale(t)))

    def drift_coefficient(self, t: torch.Tensor | float) -> torch.Tensor:
        return -0.5 * self.beta(t)

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.sqrt(self.beta(t))

    def step_beta(self, t: torch.Tensor | float) -> torch.Tensor:
        """The beta of the discretization's step at t; the N betas go from beta_min / N to beta_max / N."""
        share = _to_float64(self.index(t)) / max(self.N - 1, 1)
        return (self.beta_min + share * (self.beta_max - self.beta_min)) / self.N

    def discrete(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        beta = self.step_beta(t)
        return torch.expm1(0.5 * torch.log1p(-beta)), torch.sqrt(beta)

    def conditioning_times(self, t: torch.Tensor | float) -> torch.Tensor:
        return _to_float64(t) * (self.N - 1) * self.time_scale

    def times(self, conditioning_times: torch.Tensor | float) -> torch.Tensor:
        return _to_float64(conditioning_times) / self.time_scale / max(self.N - 1, 1)


class ChainSDE(VPSDE):
    """The VP process through the noise levels of a discrete chain: alphas_cumprod[k] is reached at t = (k + 1) / T.

    Between these times, and down to t = 0 where alphas_cumprod is 1, log(alphas_cumprod) is a monotone cubic (Fritsch &
    Carlson 1980). The conditioning times are t T - 1: the timesteps k, and numbers between them, which a sinusoidal embedding
    takes as well. Times below 1 / T, `t_min`, are not used.

    Args:
        alphas_cumprod: (T,), best in float64.
        prediction_type: that of the chain, but not "previous", which has no score between timesteps.
        rescale_timesteps: as in `VPSDE`.

    Raises:
        ValueError: alphas_cumprod does not fall, or reaches 0.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon", rescale_timesteps: bool = False):
        abar = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        SDE.__init__(self, len(abar), prediction_type)
        self.t_min, self.time_scale = 1 / self.N, 1000 / self.N if rescale_timesteps else 1.0
        if not (abar.min() > 0 and (torch.diff(abar, prepend=torch.ones(1)) < 0).all()):
            raise ValueError("alphas_cumprod must fall and stay above 0: the ODE cannot leave zero terminal SNR")
        knots = torch.cat((torch.zeros(1, dtype=torch.float64), 0.5 * abar.log()))
        rise = torch.diff(knots)
        slope = 2 * rise[1:] * rise[:-1] / (rise[1:] + rise[:-1])  # the harmonic mean overshoots nowhere
        first, last = torch.cat((rise[:1], slope)), torch.cat((slope, rise[-1:]))
        # (N, 4), the cubic of each interval, and copies of it on other devices
        self.cubics = torch.stack((knots[:-1], first, 3 * rise - 2 * first - last, first + last - 2 * rise), dim=1)
        self.cubics_on: dict[torch.device, torch.Tensor] = {}

    def _piece(self, t):
        """The place of t in its interval, 0 to 1, and the four coefficients of the cubic there, constant term first."""
        place = _to_float64(t) * self.N
        k = place.long().clamp(0, self.N - 1)
        if place.device not in self.cubics_on:
            with torch.inference_mode(False):
                self.cubics_on[place.device] = self.cubics.to(place.device, place.dtype)
        return place - k, *self.cubics_on[place.device][k].unbind(-1)

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        u, a, b, c, d = self._piece(t)
        return a + u * (b + u * (c + u * d))

    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        u, _, b, c, d = self._piece(t)
        return -2 * (b + u * (2 * c + u * 3 * d)) * self.N

    def step_beta(self, t: torch.Tensor | float) -> torch.Tensor:
        before = (_to_float64(t) - 1 / self.N).clamp(min=0.0)
        return -torch.expm1(2 * (self.log_scale(t) - self.log_scale(before)))

    def conditioning_times(self, t: torch.Tensor | float) -> torch.Tensor:
        return (_to_float64(t) * self.N - 1) * self.time_scale

    def times(self, conditioning_times: torch.Tensor | float) -> torch.Tensor:
        return (_to_float64(conditioning_times) / self.time_scale + 1) / self.N


class SubVPSDE(VPSDE):
    """Sub-VP SDE: the drift of `VPSDE` with at most its variance (eq. 12, 34)."""

    short_name = "sub-VP"

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return -torch.expm1(2 * self.log_scale(t))

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(4 * self.log_scale(t)))

    def discrete(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        return SDE.discrete(self, t)


class VESDE(SDE):
    """Variance exploding SDE of NCSN: noise of standard deviation sigma(t) = sigma_min (sigma_max / sigma_min)^t (eq. 9, 30).

    At t = 0 the variance is sigma_min^2, as in the code of Score-SDE.

    Args in addition to sigma_min, sigma_max and those of `SDE`:
        conditioning: "sigma": the conditioning times are sigma(t). "level_index": they are round((1 - t) (N - 1)), int64, the
            index among N discrete noise levels, 0 for sigma_max (NCSN; networks of Score-SDE that are not continuous).

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    short_name = "VE"

    time_embedding_type = "fourier"

    @checked_arguments(**SDE_RANGES)
    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        N: int = 1000,
        prediction_type: str = "score",
        conditioning: str = "sigma",
    ):
        super().__init__(N, prediction_type)
        self.has_levels = conditioning == "level_index"
        if self.has_levels:
            self.time_embedding_type = "positional"
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: must be 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.prior_std = sigma_min, sigma_max, sigma_max
        self.log_ratio = math.log(sigma_max / sigma_min)

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.zeros_like(_to_float64(t))

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.sigma_min * torch.exp(_to_float64(t) * self.log_ratio)

    def drift_coefficient(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.zeros_like(_to_float64(t))

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.std(t) * math.sqrt(2 * self.log_ratio)

    def discrete(self, t: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        k = _to_float64(self.index(t))
        ratio = math.exp(2 * self.log_ratio / max(self.N - 1, 1))  # of the variances of two consecutive steps
        variance = self.std(k / max(self.N - 1, 1)) ** 2
        G = torch.sqrt(torch.where(k > 0, variance * (1 - 1 / ratio), variance))
        return torch.zeros_like(G), G

    def conditioning_times(self, t: torch.Tensor | float) -> torch.Tensor:
        return ((1 - _to_float64(t)) * (self.N - 1)).round().long() if self.has_levels else self.std(t)

    def trained_times(self, t: torch.Tensor) -> torch.Tensor:
        return self.times(self.conditioning_times(t)) if self.has_levels else t

    def times(self, conditioning_times: torch.Tensor | float) -> torch.Tensor:
        if self.has_levels:
            return 1 - _to_float64(conditioning_times) / max(self.N - 1, 1)
        return torch.log(_to_float64(conditioning_times) / self.sigma_min) / self.log_ratio


def _to_float64(t):
    return t.to(finest_dtype(t.device)) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)


def broadcast(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A coefficient () or (B,) in the dtype, on the device and in a shape that multiplies images x (B, C, H, W)."""
    coefficient = coefficient.to(x.device, x.dtype)
    return coefficient if coefficient.dim() == 0 else coefficient.view(-1, *[1] * (x.dim() - 1))
