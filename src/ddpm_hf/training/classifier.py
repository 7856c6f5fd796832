"""Training of a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, section 4: "ADM")."""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.extras import require_extra
from ddpm_hf.files.atomic import replacing_folder
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.models.classifier import NoisyClassifier
from ddpm_hf.models.evaluation_mode import evaluation_mode
from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
from ddpm_hf.schedulers.conditioning_times import conditioning_times
from ddpm_hf.training.config import ClassifierConfig, image_size
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error
from ddpm_hf.training.from_pipeline import guided_class_names
from ddpm_hf.training.inputs import check_pixels, held_out_images
from ddpm_hf.training.measurements import ROUNDS
from ddpm_hf.training.optimizer import check_schedule
from ddpm_hf.training.processes import make_scheduler
from ddpm_hf.training.task import BatchLoss, Task
from ddpm_hf.training.timesteps import UniformTimesteps
from ddpm_hf.training.trackers import check_trackers


class ClassifierTask(Task):
    """A classifier of x_t, by the cross entropy of its logits."""

    LOG_COLUMNS = ("accuracy",)

    def __init__(self, config: ClassifierConfig):
        self.config = config
        check_schedule(config)
        check_trackers(config.trackers)
        require_extra("matplotlib", "train", "plots")
        self.scheduler = make_scheduler(config)
        check_pixels(config)
        self.network = NoisyClassifier(
            sample_size=image_size(config),
            in_channels=config.channels,
            scheduler=json.loads(self.scheduler.to_json_string()),
            **config.classifier,
        )
        self.network.class_names = guided_class_names(config) if config.pipeline else None  # type: ignore[assignment]
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.timesteps = UniformTimesteps(self.scheduler)
        self.t_end = len(self.scheduler.alphas_cumprod)

    def open_inputs(self, data, accelerator, is_new):
        config = self.config
        with as_config_error(f"pipeline={config.pipeline!r}", PIPELINE_ERRORS):
            opens = config.pipeline and accelerator.is_main_process
            self.base = DDPMImagePipeline.from_pretrained(config.pipeline) if opens else None
        # a label means what it means to the pipeline
        data = dataclasses.replace(data, class_names=self.network.class_names or data.class_names)
        self.held_out = held_out_images(config, data.class_names) if config.eval_every else None
        return data

    def begin(self, accelerator, dataset, log, interrupts):
        self.log, self.interrupts = log, interrupts
        return {}

    def loss(self, network, batch):
        labels = batch["class_labels"]
        x_start = pixels_to_batch(batch["pixels"], self.scheduler.levels, self.config.random_flip)
        x_start = random_crop(x_start, self.config.random_crop)
        t, weights = self.timesteps.sample(len(x_start), x_start.device)
        x_t = self.scheduler.q_sample(x_start, t, torch.randn_like(x_start))
        logits = network(x_t, conditioning_times(self.scheduler, t)).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return BatchLoss(x_start, t, losses, weights, (logits.argmax(1) == labels,))

    def measure(self, step):
        config = self.config
        if not config.eval_every or (step % config.eval_every and step != config.steps):
            return None
        self.log.begin_work(step, f"measuring {len(self.held_out[0])} held-out images")
        row = held_out_accuracy(config, self.interrupts, self.network, self.scheduler, *self.held_out)
        self.log.note(step, **row)
        return row["loss_held_out"]

    def save(self, step):
        output, network = Path(self.config.output_dir), self.network.eval()
        with replacing_folder(output / "classifier") as folder:
            network.save_pretrained(folder)
        if self.base:
            with replacing_folder(output / "pipeline") as folder:
                DDPMImagePipeline(self.base.unet, self.base.scheduler, network).save_pretrained(folder)
                write_model_card(folder)

    def saved_as(self):
        output = Path(self.config.output_dir)
        return f"{output / 'classifier'}" + (f" and {output / 'pipeline'}" if self.config.pipeline else "")


def random_crop(x_start: torch.Tensor, smallest: float) -> torch.Tensor:
    """Crop images (B, C, H, W) at random to `smallest` to 1 of their sides, and scale them up again (bilinear)."""
    if smallest == 1:
        return x_start
    side = smallest + (1 - smallest) * torch.rand(len(x_start), 1, device=x_start.device)
    offset = (2 * torch.rand(len(x_start), 2, device=x_start.device) - 1) * (1 - side)
    zero = torch.zeros_like(side)
    theta = torch.stack((side, zero, offset[:, :1], zero, side, offset[:, 1:]), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x_start.shape), align_corners=False)
    return F.grid_sample(x_start, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def held_out_accuracy(config, interrupts, network, scheduler, x_start, labels) -> dict[str, float]:
    """The loss and the accuracy on held-out images, also by quarter of t, at `ROUNDS` timesteps each, evenly over the process.

    The noise is the same every time. NaN where they cannot be computed.

    Raises:
        Interrupted: a signal came meanwhile. In all processes.
    """
    T, count, device = len(scheduler.alphas_cumprod), len(x_start), interrupts.accelerator.device
    t = torch.arange(count * ROUNDS) * T // (count * ROUNDS)

    def compute():
        generator, losses, is_right = torch.Generator().manual_seed(config.seed), [], []
        for part in torch.arange(count * ROUNDS).split(config.batch_size):
            x, y = x_start[part % count].to(device), labels[part % count].to(device)
            noise = torch.randn(x.shape, generator=generator).to(device)
            t_part = t[part].to(device)
            x_t = scheduler.q_sample(x, t_part, noise)
            logits = network(x_t, conditioning_times(scheduler, t_part)).float()
            losses.append(F.cross_entropy(logits, y, reduction="none").cpu())
            is_right.append((logits.argmax(1) == y).float().cpu())
        return torch.cat(losses), torch.cat(is_right)

    with evaluation_mode(network):
        shares = interrupts.run(network, compute)
    losses, is_right = torch.full((2, count * ROUNDS), math.nan) if shares is None else shares[0]
    quarter = t * 4 // T
    by_quarter = {f"accuracy_held_out_t_quarter_{i + 1}": is_right[quarter == i].mean().item() for i in range(4)}
    return {"loss_held_out": losses.mean().item(), "accuracy_held_out": is_right.mean().item(), **by_quarter}
