"""At which timesteps a network is trained: uniformly, by importance, or in continuous time."""

import math

import torch

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import finest_dtype
from ddpm_hf.schedulers.sde import SDE


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
        self.least, self.importance = sde.t_min, importance
        # cells in which the density is constant: fine near 0, where it falls as 1 / t, and near 1, where betas may grow
        logarithmic = torch.linspace(math.log(sde.t_min), 0.0, 2001, dtype=torch.float64).exp()
        even = torch.linspace(sde.t_min, 1.0, 5001, dtype=torch.float64)
        edges = torch.cat((logarithmic, even)).clamp(sde.t_min, 1.0).unique()
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
