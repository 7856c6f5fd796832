""""""

import math

import torch

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.prediction import SDE_PREDICTIONS, score_weights

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
        return score_weights(self.prediction_type, self.scale(t), self.std(t))

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


def finest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def _double(t):
    return t.to(finest_dtype(t.device)) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)


def _like(coefficient, x):
    """() or (B,) -> what multiplies images x."""
    coefficient = coefficient.to(x.device, x.dtype)
    return coefficient if coefficient.dim() == 0 else coefficient.view(-1, *[1] * (x.dim() - 1))
