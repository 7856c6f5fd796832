"""Optimizer steps without a finite gradient: they are skipped, and too many in a row end the run."""

import torch

from ddpm_hf.training.interrupts import Stopped


class FiniteSteps:
    """Skips the optimizer steps whose gradient is not finite, on the device: the host does not wait for it.

    `skipped` counts those of the whole run, `in_a_row` those since the last finite step, as float32 scalars on the device.
    """

    def __init__(self, device: torch.device, limit: int):
        self.limit = limit
        self.skipped, self.in_a_row = torch.zeros(2, device=device)

    def state_dict(self):
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.skipped, self.in_a_row = (state[key].to(self.skipped.device) for key in ("skipped", "in_a_row"))

    def check(self, norm: torch.Tensor, optimizer: torch.optim.AdamW, scaled: bool = False) -> None:
        """Call before each step: a fused optimizer changes nothing where `found_inf` is 1.

        Args:
            norm: of the gradient, a scalar.
            scaled: whether there is a gradient scaler, which skips such steps itself.
        """
        not_finite = 1 - norm.detach().isfinite().float()
        self.skipped, self.in_a_row = self.skipped + not_finite, (self.in_a_row + 1) * not_finite
        if not scaled:
            optimizer.found_inf = not_finite

    def raise_if_lost(self, norm: torch.Tensor, t: torch.Tensor, losses: torch.Tensor, position) -> None:
        """Stop a run that makes no progress; to be called after some steps only, as it waits for the device.

        Args:
            norm, t, losses: of the last step.
            position: of the run, see `Position`.

        Raises:
            Stopped: `limit` steps in a row were skipped, the last one among them.
        """
        if self.in_a_row < self.limit:
            return
        timesteps = ", ".join(f"{time:g}" for time in t[~losses.isfinite()].tolist()[:8]) or "none here"
        raise Stopped(
            f"{int(self.in_a_row)} steps in a row had no finite gradient and were skipped; the last: step {position.step}, "
            f"epoch {position.epoch}, batch {position.batch - 1}, gradient norm {float(norm)}, losses that are not finite at "
            f"t = {timesteps}; try a lower learning_rate, more lr_warmup_steps, or mixed_precision no"
        )
