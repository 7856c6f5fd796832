"""Samplers of the timesteps that a network is trained at: uniform, evenly spread, by importance, and in continuous time."""

import math

import torch

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.ddpm import VariationalDDPMScheduler
from ddpm_hf.schedulers.precision import finest_dtype
from ddpm_hf.schedulers.sde import SDE


def low_discrepancy_points(
    batch_size: int, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw points (batch_size,) in [0, 1), at equal distances on a circle: (u + i / batch_size) mod 1 with one uniform u.

    Each point alone is uniform (VDM: Kingma et al. 2021, appendix I.1). In the finest dtype of the device; the generator, if
    given, must be on it.
    """
    dtype = finest_dtype(device)
    shift = torch.rand((), generator=generator, device=device, dtype=dtype)
    return (shift + torch.arange(batch_size, device=device, dtype=dtype) / batch_size) % 1


def _uniform_points(batch_size, device, generator, low_discrepancy):
    """Points (batch_size,) in [0, 1), independent or `low_discrepancy_points`."""
    if low_discrepancy:
        return low_discrepancy_points(batch_size, device, generator)
    return torch.rand(batch_size, generator=generator, device=device, dtype=finest_dtype(device))


class _Stateless:
    """The base of samplers that ignore the losses."""

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Ignore the losses."""

    def state_dict(self) -> dict:
        """There is no state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """There is no state to restore."""


class UniformTimesteps(_Stateless):
    """Draws timesteps uniformly from the scheduler's chain (Algorithm 1)."""

    def __init__(self, scheduler: VariationalDDPMScheduler):
        self.scheduler = scheduler

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw 0-based timesteps, int64 (batch_size,), and return them with the weights of their losses, ones in float32."""
        return self.scheduler.draw_timesteps(batch_size, device, generator), torch.ones(batch_size, device=device)


class LowDiscrepancyTimesteps(_Stateless):
    """Draws timesteps that are spread evenly over the chain within a batch (VDM: Kingma et al. 2021, appendix I.1).

    Each timestep of a batch is uniform by itself, so the mean loss stays unbiased, and varies less than that of independent
    timesteps. If the batch size is a multiple of the chain's length, every timestep occurs equally often. In a run of several
    processes each process spreads its own batch.

    Args:
        scheduler: timesteps are drawn from the chain that it has now; later calls of `set_timesteps` change nothing.
    """

    def __init__(self, scheduler: VariationalDDPMScheduler):
        self.chain = torch.tensor(scheduler.chain)

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw 0-based timesteps, int64 (batch_size,), and return them with the weights of their losses, ones in float32.

        They are drawn on the device of the generator, if there is one.
        """
        device = torch.device(device or "cpu")
        u = low_discrepancy_points(batch_size, device if generator is None else generator.device, generator)
        self.chain = self.chain.to(u.device)
        t = self.chain[(u * len(self.chain)).long()]  # below the length, as u is below 1
        return t.to(device), torch.ones(batch_size, device=device)


class LossSecondMomentTimesteps:
    """Draws timesteps with a probability proportional to the root mean square of their last losses (IDDPM section 3.3).

    Uniform until every timestep of the chain has `history_per_timestep` losses. The weights returned with the timesteps keep
    the mean loss unbiased. All processes of a distributed run share one history, which `state_dict` holds.

    Args:
        scheduler: timesteps are drawn from its chain.
        history_per_timestep: number of losses kept for each timestep.
        uniform_probability: share of the probability that is spread evenly, so that every timestep keeps being drawn.

    Raises:
        ValueError: history_per_timestep outside [1, 10000], or uniform_probability outside (0, 1].
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
        # timesteps outside the chain have the position of the last row, whose losses are discarded
        self.position = torch.full((T,), len(self.chain)).index_put_((self.chain,), torch.arange(len(self.chain)))
        self.losses = torch.zeros(len(self.chain) + 1, history_per_timestep, dtype=torch.float64)
        self.count = torch.zeros(len(self.chain), dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """The probability of each step of the chain, (N,), in the finest dtype of the device."""
        N, history = len(self.chain), self.losses.shape[1]
        size = self.losses[:-1].square().mean(1).sqrt().clamp(min=1e-30)
        learned = size / size.sum() * (1 - self.uniform_probability) + self.uniform_probability / N
        return torch.where((self.count >= history).all(), learned, 1 / N)  # on the device, without waiting for it

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw 0-based timesteps, int64 (batch_size,), and return them with float32 weights 1 / (N p(t)) of their losses.

        The generator, if given, must be on `device`.
        """
        device = device or self.chain.device
        self._move_to(device)
        probabilities = self.probabilities()
        drawn = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        weights = 1 / (len(self.chain) * probabilities[drawn])
        return self.chain[drawn].to(device), weights.float().to(device)

    @torch.no_grad()
    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Add a batch to the history.

        Args:
            t: int64 (B,), timesteps of the chain, with the same B in every process.
            losses: (B,), unweighted; those that are not finite are ignored.
        """
        self._move_to(t.device)
        device = self.chain.device
        batch = torch.stack((t.to(device, self.losses.dtype), losses.detach().to(device, self.losses.dtype)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            batches = [torch.empty_like(batch) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(batches, batch)
            batch = torch.cat(batches, dim=1)
        N, history = len(self.chain), self.losses.shape[1]
        finite = batch[1].isfinite()
        step = torch.where(finite, self.position[batch[0].long()], N)
        # rank among the batch's losses of the same timestep; if there are more than the history holds, the last ones stay
        order = step.argsort(stable=True)
        step, loss = step[order], torch.where(finite, batch[1], 0.0)[order]
        rank = torch.arange(len(step), device=step.device) - torch.searchsorted(step, step)
        total = step.new_zeros(N + 1).index_add_(0, step, torch.ones_like(step))
        slot = (torch.cat((self.count, self.count.new_zeros(1)))[step] + rank) % history
        row = torch.where(total[step] - rank <= history, step, N)
        self.losses[row, slot] = loss
        self.count += total[:N]

    def _move_to(self, device):
        for name in ("chain", "position", "count"):
            setattr(self, name, getattr(self, name).to(device))
        self.losses = self.losses.to(device, finest_dtype(torch.device(device)))

    def state_dict(self) -> dict:
        """The history: losses (N + 1, history_per_timestep), and how many each timestep has had, (N,)."""
        return {"losses": self.losses, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Restore the history. Raises ValueError for that of another chain or history length."""
        for name in ("losses", "count"):
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} of shape {tuple(state[name].shape)} is from a sampler of another chain or history_per_timestep; "
                    f"this one has {tuple(getattr(self, name).shape)}"
                )
            present = getattr(self, name)
            setattr(self, name, state[name].clone().to(present.device, present.dtype))


class ContinuousTimes(_Stateless):
    """Draws times in [t_min, 1] of a process, uniformly or by importance, with a density proportional to g^2 / std^2.

    Importance sampling is for the "likelihood" weighting, which is large near t = 0 (ScoreFlow, section 4.1). The weights
    returned with the times keep the mean loss that of uniform times.

    Args:
        sde: the process.
        importance: whether to draw by importance.
        low_discrepancy: whether to spread the uniform times of a batch evenly, as `LowDiscrepancyTimesteps`.

    Raises:
        ValueError: both importance and low_discrepancy.
    """

    def __init__(self, sde: SDE, importance: bool = False, *, low_discrepancy: bool = False):
        if importance and low_discrepancy:
            raise ValueError("importance=True and low_discrepancy=True exclude each other; give one")
        self.t_min, self.importance, self.low_discrepancy = sde.t_min, importance, low_discrepancy
        # cells of constant density, fine near 0, where it falls as 1 / t, and near 1, where betas may grow
        logarithmic = torch.linspace(math.log(sde.t_min), 0.0, 2001, dtype=torch.float64).exp()
        even = torch.linspace(sde.t_min, 1.0, 5001, dtype=torch.float64)
        edges = torch.cat((logarithmic, even)).clamp(sde.t_min, 1.0).unique()
        width, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
        density = (sde.diffusion(middle) / sde.std(middle)) ** 2
        density /= (density * width).sum()
        self.cells = edges[:-1], width, density
        self.cells_on: dict[torch.device, list[torch.Tensor]] = {}

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw times (batch_size,) in the finest dtype of the device; return them with float32 weights of their losses.

        The generator, if given, must be on `device`.
        """
        device = torch.device(device or "cpu")
        u = _uniform_points(batch_size, device, generator, self.low_discrepancy)
        if not self.importance:
            return self.t_min + (1 - self.t_min) * u, torch.ones(batch_size, device=device)
        if device not in self.cells_on:
            self.cells_on[device] = [column.to(device, u.dtype) for column in self.cells]
        first, width, density = self.cells_on[device]
        cell = torch.multinomial(density * width, batch_size, replacement=True, generator=generator)
        return first[cell] + u * width[cell], (1 / (density[cell] * (1 - self.t_min))).float()


class FractionalTimesteps(_Stateless):
    """Draws times uniformly in [0, T - 1], timesteps and numbers between them, for `ContinuousBoundObjective`.

    Args:
        scheduler: gives T, its num_train_timesteps.
        low_discrepancy: whether to spread those of a batch evenly, as `LowDiscrepancyTimesteps`.
    """

    def __init__(self, scheduler: VariationalDDPMScheduler, low_discrepancy: bool = False):
        self.last, self.low_discrepancy = scheduler.config.num_train_timesteps - 1, low_discrepancy

    def sample(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw times (batch_size,) in the finest dtype of the device; return them with weights, ones in float32."""
        device = torch.device(device or "cpu")
        u = _uniform_points(batch_size, device, generator, self.low_discrepancy)
        return self.last * u, torch.ones(batch_size, device=device)


TIMESTEPS = {
    "uniform": UniformTimesteps,
    "low_discrepancy": LowDiscrepancyTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}
