"""Measure the cost of EMA, log, checkpoints and data loader, as shares of the time of a training step.

    python benchmarks/training_overhead.py --config cifar10 --batch_size 16

Takes the arguments of training/train.py. Each part is timed separately, after one warm-up call. The timer waits until
the device has finished.
"""

import contextlib
import statistics
import sys
import tempfile

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from measure import in_turns

from ddpm_hf.data.dataset import PixelTensors
from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.training.batches import Position, batches, open_loader
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.command_line import load_config
from ddpm_hf.training.diffusion import DiffusionTask
from ddpm_hf.training.finite_steps import FiniteSteps
from ddpm_hf.training.log import Log
from ddpm_hf.training.output import OutputFolder


def median_seconds(call, repeats):
    """Return the median seconds of a call after one warm-up call."""
    return statistics.median(in_turns({"": call}, repeats, warmup=1)[""])


def main():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config, _ = load_config([*sys.argv[1:], "--output_dir", f"{folder}/run"])
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision)
        device = accelerator.device
        task = DiffusionTask(config)
        unet, objective, timesteps = task.network, task.objective, task.timesteps
        optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, fused=True)
        ema = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
        unet, optimizer = accelerator.prepare(unet, optimizer)
        ema.to(device)
        height = width = config.image_size
        pixels = torch.randint(0, 256, (4096, config.channels, height, width), dtype=torch.uint8)
        stream = batches(open_loader(PixelTensors(pixels), config, accelerator), config, Position())
        output = stack.enter_context(OutputFolder(config, accelerator))
        finite, log = FiniteSteps(device, 25), Log(config, output, accelerator, 1000)
        checkpoints = Checkpoints(config, accelerator, per_process=dict(at=Position(), log=log), ema=ema, finite=finite)
        last_step, steps = {}, iter(range(1, 100))

        def step():
            x_start = pixels_to_batch(next(stream)["pixels"], 256, config.random_flip)
            t, weights = timesteps.sample(len(x_start), device)
            losses = objective(unet, x_start, None, t)
            accelerator.backward((weights * losses).mean())
            last_step["norm"] = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            last_step.update(x_start=x_start, t=t, losses=losses.detach(), weights=weights)
            optimizer.step()
            optimizer.zero_grad()

        def write_log_row():
            log.add(last_step["x_start"], last_step["t"], last_step["losses"], last_step["weights"])
            log.step(
                config.log_every, last_step["norm"], steps_skipped=finite.skipped, learning_rate=0.1, ema_decay=0.9
            )

        step_seconds = median_seconds(step, 5)
        costs = {
            "EMA": median_seconds(lambda: ema.step(unet.parameters()), 10),
            "skipping of steps that are not finite": median_seconds(
                lambda: finite.check(last_step["norm"], optimizer.optimizer), 10
            ),
            f"log, a row every {config.log_every} steps": median_seconds(
                lambda: log.add(last_step["x_start"], last_step["t"], last_step["losses"], last_step["weights"]), 10
            )
            + median_seconds(write_log_row, 10) / config.log_every,
            f"checkpoint every {config.checkpoint_every} steps": median_seconds(
                lambda: checkpoints.save(next(steps)), 2
            )
            / config.checkpoint_every,
            "loader of a set in memory": median_seconds(lambda: next(stream), 50),
        }
        log.bar.close()
    print(f"\na step of {config.batch_size} images on {device}: {1000 * step_seconds:.1f} ms")
    for name, value in costs.items():
        print(f"{name:40} {1000 * value:9.3f} ms  {value / step_seconds:8.3%}")
    print(f"{'together':40} {1000 * sum(costs.values()):9.3f} ms  {sum(costs.values()) / step_seconds:8.3%}")


if __name__ == "__main__":
    main()
