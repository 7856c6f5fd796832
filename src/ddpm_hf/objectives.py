"""Training losses of denoising diffusion models, and the timesteps they are trained at."""

import math
from collections.abc import Callable

import numpy as np
import torch

from .arguments import checked_arguments
from .scheduler import VariationalDDPMScheduler
from .sde import SDE, finest_dtype

LOSSES = ("simple", "vlb", "hybrid")
SCORE_WEIGHTINGS = ("variance", "likelihood")
# Name -> what an error of x_0 counts, as a function of SNR = abar / (1 - abar). Plain "simple" with epsilon prediction is SNR.
WEIGHTINGS = {
    "min_snr": lambda snr: np.minimum(snr, 5.0),  # Hang et al. 2023, gamma = 5
    "truncated_snr": lambda snr: np.maximum(snr, 1.0),  # Salimans & Ho 2022
    "p2": lambda snr: snr / (1.0 + snr),  # Choi et al. 2022, k = gamma = 1
}


class DiffusionObjective:
    """The loss of Algorithm 1 and its relatives, one number for each image.

    Args:
        scheduler: gives q, the prediction type and the variances; timesteps are drawn from its chain.
        loss: "simple": the mean squared error of the prediction (Ho, Jain, Abbeel 2020, eq. 14; of the mean part alone when
            the variance is learned). "vlb": N times the bound's term at the drawn t, N the chain's length, in bits/dim, so
            that its mean over t is the bound without L_T (eq. 5). "hybrid": simple + vlb_weight * vlb, in which the mean is
            detached, so that the bound trains the variance alone (IDDPM eq. 16). With a fixed variance "vlb" is the paper's
            eq. 12 and its weights.
        vlb_weight: of "hybrid"; IDDPM's 0.001, which its code calls rescaled_mse; its plain mse is vlb_weight = 1 / N, its
            rescaled_kl "vlb".
        weighting: of the mean squared error by t: None for none; "min_snr" (Hang et al. 2023, gamma 5) and "p2" (Choi et al.
            2022) for any prediction type; "truncated_snr" (Salimans & Ho 2022) for "sample" and "v_prediction".

    Raises:
        ValueError: unknown loss or weighting; "hybrid" where no variance is learned; a weighting of "vlb", which has its own;
            "truncated_snr" where the network predicts epsilon or the mean: x_0 counts in full at pure noise, where a small
            error of epsilon is one of x_0 up to 4e8 times its square (cosine schedule).
    """

    @checked_arguments(loss=LOSSES, vlb_weight="[0, 1000000]", weighting=(None, *WEIGHTINGS))
    def __init__(
        self,
        scheduler: VariationalDDPMScheduler,
        loss: str = "simple",
        vlb_weight: float = 0.001,
        weighting: str | None = None,
    ):
        if loss == "hybrid" and not scheduler.variance_type.startswith("learned"):
            raise ValueError(f"loss='hybrid' trains a learned variance; variance_type is {scheduler.variance_type!r}")
        if weighting is not None and loss == "vlb":
            raise ValueError(f"weighting={weighting!r} is of the mean squared error; loss='vlb' has the bound's own")
        if weighting == "truncated_snr" and scheduler.prediction_type not in ("sample", "v_prediction"):
            raise ValueError(
                f"weighting='truncated_snr' is for prediction_type 'sample' or 'v_prediction', this scheduler has "
                f"{scheduler.prediction_type!r}, whose errors it would multiply without bound at noisy timesteps; choose "
                "another prediction_type, or weighting 'min_snr' or 'p2'"
            )
        self.scheduler, self.loss, self.vlb_weight, self.weighting = scheduler, loss, vlb_weight, weighting
        self.weights = None if weighting is None else torch.from_numpy(_mse_weights(scheduler, weighting)).float()
        self.end = len(scheduler.alphas_cumprod)  # T

    @property
    def times(self) -> torch.Tensor:
        """int64 (N,): the timesteps of the chain."""
        return torch.tensor(self.scheduler.chain)

    def __call__(
        self,
        unet: Callable,
        x_start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            unet: called as `unet(x_t, t, class_labels=..., return_dict=False)`; a tuple with the output first.
            x_start: images (B, C, H, W) in [-1, 1].
            class_labels: (B,) for a class-conditional network.
            t: int64 (B,), 0-based timesteps of the chain, on any device; None to draw them uniformly.
            noise: of the shape of x_start; None to draw it.

        Returns:
            (B,) losses, float32 at least. The predicted x_0 is never clipped here.
        """
        scheduler, steps = self.scheduler, len(self.scheduler.chain)
        if t is None:
            t = scheduler.draw_timesteps(len(x_start), x_start.device)
        t = t.to(x_start.device)
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = scheduler.q_sample(x_start, t, noise)
        output = unet(x_t, t, class_labels=class_labels, return_dict=False)[0]
        if self.loss == "vlb":
            return steps * scheduler.vlb_term(output, x_start, x_t, t, clip_sample=False)
        prediction = output[:, : x_start.shape[1]]
        target = scheduler.prediction_target(x_start, x_t, noise, t)
        mse = ((target - prediction.to(target.dtype)) ** 2).flatten(1).mean(1)
        if self.weights is not None:
            self.weights = self.weights.to(mse.device)  # once
            mse = mse * self.weights[t]
        if self.loss == "simple":
            return mse
        frozen = torch.cat((prediction.detach(), output[:, x_start.shape[1] :]), dim=1)
        vlb = steps * scheduler.vlb_term(frozen, x_start, x_t, t, clip_sample=False)
        return mse + self.vlb_weight * vlb


class ScoreObjective:
    """Denoising score matching in continuous time (Score-SDE eq. 7), one number for each image.

    Args:
        sde: the process.
        weighting: "variance": lambda = std^2, the mean squared error of the predicted noise, `DiffusionObjective`'s "simple".
            "likelihood": lambda = g^2, by which the loss bounds the negative log-likelihood (Song et al. 2021, "ScoreFlow",
            theorem 1): half its mean over t in [0, 1] times the dimensions, in nats, but for terms without the network.

    Raises:
        ValueError: unknown weighting.
    """

    @checked_arguments(weighting=SCORE_WEIGHTINGS)
    def __init__(self, sde: SDE, weighting: str = "variance"):
        self.sde, self.weighting = sde, weighting

    end = 1.0  # t of noise alone

    @property
    def times(self) -> torch.Tensor:
        """(N,) float64 times, spread evenly, at which to compare losses."""
        least = self.sde.least
        return least + (1 - least) * (torch.arange(self.sde.N, dtype=torch.float64) + 0.5) / self.sde.N

    def __call__(
        self,
        unet: Callable,
        x_start: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            unet, x_start, class_labels, noise: as in `DiffusionObjective`.
            t: (B,) in (0, 1], on any device; None to draw them evenly from the process's `least` on.

        Returns:
            (B,) losses, float32 at least.
        """
        sde = self.sde
        if t is None:
            t, _ = ContinuousTimes(sde).sample(len(x_start), x_start.device)
        t = t.to(x_start.device, finest_dtype(x_start.device))
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = sde.sample(x_start, t, noise)
        output = unet(x_t, sde.labels(t).to(x_start.dtype), class_labels=class_labels, return_dict=False)[0]
        output = output[:, : x_start.shape[1]].to(torch.promote_types(output.dtype, torch.float32))
        # std * score, which is the noise's negative where the network is right
        of_x_t, of_output = ((sde.std(t) * weight).to(output).view(-1, 1, 1, 1) for weight in sde.score_weights(t))
        loss = (of_x_t * x_t + of_output * output + noise).square().flatten(1).mean(1)
        return loss * (sde.diffusion(t) / sde.std(t)).square().to(loss) if self.weighting == "likelihood" else loss


def drop_labels(class_labels: torch.Tensor, null_class: int, probability: float) -> torch.Tensor:
    """Class labels (B,), each `null_class` with this probability: for classifier-free guidance (Ho & Salimans 2021)."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(dropped, null_class)


def _mse_weights(scheduler, weighting):
    """(T,) float64: the weight of the mean squared error of what the network predicts; NaN outside the chain."""
    chain = np.array(scheduler.chain)
    abar = scheduler.alphas_cumprod.numpy()[chain]
    before = np.append(1.0, abar[:-1])
    snr = np.maximum(abar, 1e-24) / (1 - abar)
    of_x_start = WEIGHTINGS[weighting](snr)
    # the squared error of x_0 is this times that of the prediction
    x_start_error = {
        "epsilon": 1 / snr,
        "sample": np.ones_like(snr),
        "v_prediction": 1 - abar,
        "previous": ((1 - abar) / (1 - abar / before)) ** 2 / before,
    }[scheduler.prediction_type]
    weights = np.full(len(scheduler.alphas_cumprod), np.nan)
    weights[chain] = of_x_start * x_start_error
    return weights


class UniformTimesteps:
    """Timesteps drawn uniformly from the scheduler's chain (Algorithm 1)."""

    def __init__(self, scheduler: VariationalDDPMScheduler):
        self.scheduler = scheduler

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (batch_size,) 0-based timesteps, and float32 (batch_size,) weights of their losses: ones."""
        return self.scheduler.draw_timesteps(batch_size, device, generator), torch.ones(batch_size, device=device)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Nothing is learned from the losses."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class LossSecondMomentTimesteps:
    """Importance sampling of timesteps by the root mean square of their last losses (IDDPM section 3.3).

    Uniform until every timestep of the chain has `history_per_timestep` losses. The weights that come with the timesteps keep
    the mean loss unbiased. All processes of a distributed run share one history; `state_dict` holds it.

    Args:
        scheduler: timesteps are drawn from its chain.
        history_per_timestep: losses kept of each timestep.
        uniform_probability: share of the probability that is spread evenly, so that no timestep is forgotten.

    Raises:
        ValueError: history_per_timestep outside [1, 10000], uniform_probability outside (0, 1].
    """

    @checked_arguments(history_per_timestep="[1, 10000]", uniform_probability="(0, 1]")
    def __init__(
        self,
        scheduler: VariationalDDPMScheduler,
        history_per_timestep: int = 10,
        uniform_probability: float = 0.001,
    ):
        self.uniform_probability = uniform_probability
        self.chain = torch.tensor(scheduler.chain)
        T = scheduler.config.num_train_timesteps
        # other timesteps have the position of what is thrown away
        self.position = torch.full((T,), len(self.chain)).index_put_((self.chain,), torch.arange(len(self.chain)))
        # one row more than steps, for what is thrown away
        self.losses = torch.zeros(len(self.chain) + 1, history_per_timestep, dtype=torch.float64)
        self.count = torch.zeros(len(self.chain), dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """(N,), of each step of the chain: float64, float32 on a device that has no other."""
        N, history = len(self.chain), self.losses.shape[1]
        size = self.losses[:-1].square().mean(1).sqrt().clamp(min=1e-30)
        learned = size / size.sum() * (1 - self.uniform_probability) + self.uniform_probability / N
        return torch.where((self.count >= history).all(), learned, 1 / N)  # decided where the counts are: no waiting

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (batch_size,) 0-based timesteps, and float32 (batch_size,) weights 1 / (N p(t)) of their losses.

        The generator, where one is given, must be of `device`.
        """
        device = device or self.chain.device
        self._to(device)
        probabilities = self.probabilities()
        drawn = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        weights = 1 / (len(self.chain) * probabilities[drawn])
        return self.chain[drawn].to(device), weights.float().to(device)

    @torch.no_grad()
    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Learns from a batch: t int64 (B,) of the chain, losses (B,) unweighted, the same B in every process.

        Losses that are not finite are left out.
        """
        self._to(t.device)
        device = self.chain.device
        seen = torch.stack((t.to(device, self.losses.dtype), losses.detach().to(device, self.losses.dtype)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(seen) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, seen)
            seen = torch.cat(parts, dim=1)
        N, history = len(self.chain), self.losses.shape[1]
        good = seen[1].isfinite()
        step = torch.where(good, self.position[seen[0].long()], N)
        # rank among the batch's losses of the same timestep; of more than the history holds the last ones stay
        order = step.argsort(stable=True)
        step, loss = step[order], torch.where(good, seen[1], 0.0)[order]
        rank = torch.arange(len(step), device=step.device) - torch.searchsorted(step, step)
        total = step.new_zeros(N + 1).index_add_(0, step, torch.ones_like(step))
        slot = (torch.cat((self.count, self.count.new_zeros(1)))[step] + rank) % history
        row = torch.where(total[step] - rank <= history, step, N)
        self.losses[row, slot] = loss
        self.count += total[:N]

    def _to(self, device):
        for name in ("chain", "position", "count"):
            setattr(self, name, getattr(self, name).to(device))
        self.losses = self.losses.to(device, finest_dtype(torch.device(device)))

    def state_dict(self) -> dict:
        return {"losses": self.losses, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of another chain or history length."""
        for name in ("losses", "count"):
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} of shape {tuple(state[name].shape)} is the state of another sampler; this one has "
                    f"{tuple(getattr(self, name).shape)}"
                )
            own = getattr(self, name)
            setattr(self, name, state[name].clone().to(own.device, own.dtype))


class ContinuousTimes:
    """Times in [least, 1] of a process: evenly, or by importance, as g^2 / std^2 (ScoreFlow, section 4.1).

    The weights that come with them keep the mean loss over even times. Nothing is learned from the losses.

    Args:
        sde: the process.
        importance: whether by importance: for the likelihood's weights, which are large near t = 0.
    """

    def __init__(self, sde: SDE, importance: bool = False):
        self.least, self.importance = sde.least, importance
        # cells in which the density is constant: fine near 0, where it falls as 1 / t, and near 1, where betas may grow
        logarithmic = torch.linspace(math.log(sde.least), 0.0, 2001, dtype=torch.float64).exp()
        even = torch.linspace(sde.least, 1.0, 5001, dtype=torch.float64)
        edges = torch.cat((logarithmic, even)).clamp(sde.least, 1.0).unique()
        width, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
        density = (sde.diffusion(middle) / sde.std(middle)) ** 2
        density /= (density * width).sum()
        self.cells = edges[:-1], width, density
        self.cells_on = {}  # by device

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch_size,) times, float64 where the device has it, and float32 weights of their losses.

        The generator, where one is given, must be of `device`.
        """
        device = torch.device(device or "cpu")
        u = torch.rand(batch_size, generator=generator, device=device, dtype=finest_dtype(device))
        if not self.importance:
            return self.least + (1 - self.least) * u, torch.ones(batch_size, device=device)
        if device not in self.cells_on:
            self.cells_on[device] = [each.to(device, u.dtype) for each in self.cells]
        first, width, density = self.cells_on[device]
        cell = torch.multinomial(density * width, batch_size, replacement=True, generator=generator)
        return first[cell] + u * width[cell], (1 / (density[cell] * (1 - self.least))).float()

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Nothing is learned from the losses."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


TIMESTEPS = {"uniform": UniformTimesteps, "loss_second_moment": LossSecondMomentTimesteps}
