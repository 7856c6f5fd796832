"""Training losses of denoising diffusion models."""

from collections.abc import Callable

import torch

from .scheduler import VariationalDDPMScheduler

LOSSES = ("simple", "vlb", "hybrid")


class DiffusionObjective:
    """The loss of Algorithm 1 and its relatives, one number for each image.

    Args:
        scheduler: gives q, the prediction type and the variances; timesteps are drawn from its chain.
        loss: "simple": the mean squared error of the prediction (Ho, Jain, Abbeel 2020, eq. 14; of the mean part alone when
            the variance is learned). "vlb": N times the bound's term at the drawn t, N the chain's length, in bits/dim, so
            that its mean over t is the bound without L_T (eq. 5). "hybrid": simple + vlb_weight * vlb, in which the mean is
            detached, so that the bound trains the variance alone (IDDPM eq. 16).
        vlb_weight: of "hybrid"; IDDPM's 0.001.

    Raises:
        ValueError: unknown loss, or "hybrid" where no variance is learned.
    """

    def __init__(self, scheduler: VariationalDDPMScheduler, loss: str = "simple", vlb_weight: float = 0.001):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is not known; choose one of {', '.join(LOSSES)}")
        if loss == "hybrid" and not scheduler.variance_type.startswith("learned"):
            raise ValueError(f"loss='hybrid' trains a learned variance; variance_type is {scheduler.variance_type!r}")
        self.scheduler, self.loss, self.vlb_weight = scheduler, loss, vlb_weight

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
            t: int64 (B,), 0-based timesteps of the chain; None to draw them uniformly.
            noise: of the shape of x_start; None to draw it.

        Returns:
            (B,) losses, float32 at least. The predicted x_0 is never clipped here.
        """
        scheduler, steps = self.scheduler, len(self.scheduler.chain)
        if t is None:
            t = scheduler.draw_timesteps(len(x_start), x_start.device)
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = scheduler.q_sample(x_start, t, noise)
        output = unet(x_t, t, class_labels=class_labels, return_dict=False)[0]
        if self.loss == "vlb":
            return steps * scheduler.vlb_term(output, x_start, x_t, t, clip_sample=False)
        prediction = output[:, : x_start.shape[1]]
        target = scheduler.prediction_target(x_start, x_t, noise, t)
        mse = ((target - prediction.to(target.dtype)) ** 2).flatten(1).mean(1)
        if self.loss == "simple":
            return mse
        frozen = torch.cat((prediction.detach(), output[:, x_start.shape[1] :]), dim=1)
        vlb = steps * scheduler.vlb_term(frozen, x_start, x_t, t, clip_sample=False)
        return mse + self.vlb_weight * vlb
