"""A noise schedule that is trained with the network (VDM: Kingma et al. 2021, "Variational Diffusion Models")."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_hf.arguments import checked_arguments
from ddpm_hf.schedulers.betas import check_betas, linear_betas
from ddpm_hf.schedulers.precision import finest_dtype

SMALLEST_SLOPE = 0.01  # of a piece, as a share of the mean slope, so that no two timesteps have the same noise


class LearnedNoiseSchedule(nn.Module):
    """A learned noise schedule: a rising curve gamma = -log SNR with learned end points and a learned shape.

    abar = sigmoid(-gamma) (VDM eq. 3). The curve rises from gamma_min at position 0, the first timestep, to gamma_max at
    position 1, the last timestep, in straight pieces of equal width. It begins as one straight line between the end points
    of the linear schedule of Ho, Jain, Abbeel 2020.

    Args:
        num_train_timesteps: T, 2 to 100,000.
        beta_start, beta_end: first and last beta of the linear schedule that gives the first end points, in [1e-12, 1).
        pieces: number of straight pieces, 1 to 1,000.

    Raises:
        ValueError: an argument out of range; a linear schedule that leaves no signal before the last timestep.
    """

    @checked_arguments(
        num_train_timesteps="[2, 100000]", beta_start="[1e-12, 1)", beta_end="[1e-12, 1)", pieces="[1, 1000]"
    )
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        pieces: int = 32,
    ):
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        betas = linear_betas(num_train_timesteps, beta_start, beta_end)
        check_betas(betas, f"the first noise schedule, with beta_start={beta_start} and beta_end={beta_end},")
        log_abar = np.log1p(-betas).cumsum()[[0, -1]]
        gamma_min, gamma_max = np.log(-np.expm1(log_abar)) - log_abar
        span = gamma_max - gamma_min
        # (a, b): gamma_min = a, gamma_max = a + softplus(b - a)
        self.ends = nn.Parameter(torch.tensor([gamma_min, gamma_max + np.log(-np.expm1(-span))], dtype=torch.float32))
        self.rise_logits = nn.Parameter(torch.zeros(pieces))  # softmax gives each piece's share of the whole rise

    def start_and_span(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gamma_min, and the span gamma_max - gamma_min > 0: scalars in the finest dtype of the device."""
        first, last = self.ends.to(finest_dtype(self.ends.device))
        return first, F.softplus(last - first)

    def rise_and_slope(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the share of the whole rise up to each position in [0, 1], and its slope there; shaped like `position`."""
        logits = self.rise_logits.to(finest_dtype(self.rise_logits.device))
        pieces = len(logits)
        rise = (1 - SMALLEST_SLOPE) * logits.softmax(0) + SMALLEST_SLOPE / pieces
        before = rise.cumsum(0) - rise
        position_in_pieces = position.to(rise) * pieces
        piece = position_in_pieces.long().clamp(max=pieces - 1)
        return before[piece] + (position_in_pieces - piece) * rise[piece], pieces * rise[piece]

    def forward(self, position: torch.Tensor) -> torch.Tensor:
        """Gamma at positions in [0, 1], any shape, in the finest dtype of the device."""
        gamma_min, span = self.start_and_span()
        return gamma_min + span * self.rise_and_slope(position)[0]

    def betas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return betas and alphas_cumprod of all timesteps, differentiable in the parameters.

        Each is (T,), in the finest dtype of the device of the parameters (float64; float32 on Apple's GPUs).
        """
        device = self.ends.device
        position = torch.linspace(0, 1, self.num_train_timesteps, dtype=finest_dtype(device), device=device)
        log_abar = F.logsigmoid(-self(position))
        log_alpha = torch.cat((log_abar[:1], log_abar.diff()))
        return -torch.expm1(log_alpha), log_abar.exp()
