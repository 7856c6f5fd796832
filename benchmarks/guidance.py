"""Measure the benefit and cost of guidance on real data: fidelity and diversity by scale (ADM, figure 4), with conditional
and unconditional networks (ADM, table 4), and with classifier-free guidance.

    python benchmarks/guidance.py digits
    python benchmarks/guidance.py mnist

Trains a conditional network with label dropout, an unconditional network and a classifier of noisy images for the same process
(RUNS below), and saves them in runs/guidance/<data>. Also trains a judge, a small network of another architecture, on clean
images of the training split. Accuracy is the share of samples that the judge assigns to the requested class. Precision, recall
(Kynkäänniemi et al. 2019, k = 3) and Fréchet distance compare the judge's last features of the samples with those of an equal
number of training images. Writes to benchmarks/results:
guidance_<data>.json and .md, curves guidance_<data>.png, samples guidance_<data>_<network>.png with a row for each class, and
guidance_cost.json and .md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import pixels
from measure import RESULTS, in_turns, medians, ratio, record
from torch import nn
from tqdm.auto import tqdm

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.data.pixels import pixels_to_tensor
from ddpm_hf.data.sources import LEVELS
from ddpm_hf.evaluation.metrics import frechet_distance, precision_recall
from ddpm_hf.evaluation.sheets import as_images, as_sheet, save_figure, save_picture

ROOT = Path(__file__).parents[1]

SMALL_MNIST = [
    "--steps", "4000", "--batch_size", "32", "--unet.block_out_channels", "[16, 32, 64, 64]", "--sample_every", "0",
    "--unet.layers_per_block", "1", "--unet.norm_num_groups", "8", "--scheduler.timestep_spacing", "iddpm",
    "--scheduler.variance_type", "fixed_small",  # for few steps; with fixed_large the samples stay noisy
    "--learning_rate", "1e-3", "--lr_schedule", "cosine", "--lr_warmup_steps", "50", "--ema_decay", "0.995",
]  # fmt: skip
LABELS = ["--label_column", "label", "--unet.num_class_embeds", "10", "--label_dropout", "0.1"]
RUNS = {
    "digits": {
        "conditional": ["--config", "digits-classes"],
        "unconditional": ["--config", "digits"],
        "classifier": ["--config", "digits"],
    },
    "mnist": {
        "conditional": ["--config", "mnist", *SMALL_MNIST, *LABELS],
        "unconditional": ["--config", "mnist", *SMALL_MNIST],
        "classifier": ["--config", "mnist", "--steps", "1500"],
    },
}
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
CLASSIFIER_FREE_SCALES = (1.5, 2.0, 3.0, 5.0)
SHEET_SCALES = (0.0, 1.0, 8.0)
NUM_CLASSES, SAMPLES_PER_SCALE, BATCH_SIZE = 10, 8, 250


def open_or_train(arguments, folder, program="train.py"):
    """Open the pipeline in `folder`; train it first if it does not exist."""
    if not (folder / "pipeline").exists():
        command = [sys.executable, ROOT / "training" / program, *arguments, "--output_dir", folder]
        subprocess.run([str(word) for word in command], check=True)
    pipeline = DDPMImagePipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_pipelines(data, folder):
    """Open the pipelines "conditional" and "unconditional", each with the classifier; train what is missing."""
    arguments = RUNS[data]
    open_or_train(arguments["conditional"], folder / "conditional")
    unconditional = open_or_train(arguments["unconditional"], folder / "unconditional")
    base = ["--pipeline", folder / "conditional/pipeline"]
    guided = open_or_train([*arguments["classifier"], *base], folder / "classifier", "train_classifier.py")
    unconditional.register_modules(classifier=guided.classifier)
    return {"conditional": guided, "unconditional": unconditional}


class Judge(nn.Module):
    """A plain convolutional network that uses nothing of the package: 64 features, then logits."""

    def __init__(self, side):
        super().__init__()
        layers, channels = [], 1
        for width in (32, 64) if side < 16 else (16, 32, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, side = width, side // 2
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * side * side, 64), nn.ReLU()]
        self.features, self.logits = nn.Sequential(*layers), nn.Linear(64, NUM_CLASSES)

    def forward(self, x):
        return self.logits(self.features(x))


def train_judge(x_start, labels, seed=0, epochs=30):
    """Train the judge on images shifted by at most one pixel."""
    torch.manual_seed(seed)
    judge = Judge(x_start.shape[-1])
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    for _ in tqdm(range(epochs), desc="judge"):
        for rows in torch.randperm(len(x_start)).split(64):
            x = F.pad(x_start[rows], (1, 1, 1, 1), value=-1.0)
            row, column = torch.randint(3, (2,)).tolist()
            x = x[..., row : row + x_start.shape[-2], column : column + x_start.shape[-1]]
            optimizer.zero_grad()
            F.cross_entropy(judge(x), labels[rows]).backward()
            optimizer.step()
    return judge.eval()


def draw_samples(pipeline, class_labels, steps, **guidance_kwargs):
    """Draw samples of these classes, from the same noise for every scale."""
    generator, samples = torch.Generator().manual_seed(0), []
    uses_labels = pipeline.unet.num_classes is not None or guidance_kwargs.get("classifier_scale") is not None
    for batch in class_labels.split(BATCH_SIZE):
        guidance_kwargs["class_labels"] = batch if uses_labels else None
        output = pipeline(len(batch), generator, num_inference_steps=steps, output_type="latent", **guidance_kwargs)
        samples.append(output.images.clamp(-1, 1))
    return torch.cat(samples)


@torch.no_grad()
def judge_samples(judge, real, x_start, labels):
    """Return the accuracy of samples x_start, and their precision, recall and Fréchet distance to real features."""
    features = judge.features(x_start)
    precision, recall = precision_recall(real, features)
    return {
        "accuracy": (judge.logits(features).argmax(1) == labels).double().mean().item(),
        "precision": precision,
        "recall": recall,
        "Fréchet distance": frechet_distance(real, features),
    }


def plot(rows, path):
    """Plot each metric against the guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    curves = dict.fromkeys((row["network"], row["guidance"]) for row in rows)
    for axis, metric in zip(axes, ("accuracy", "precision", "recall", "Fréchet distance")):
        for network, guidance in curves:
            points = [row for row in rows if (row["network"], row["guidance"]) == (network, guidance)]
            scales = [row["scale"] for row in points]
            axis.plot(scales, [row[metric] for row in points], marker="o", label=f"{network}, {guidance}")
        axis.set_xscale("symlog", linthresh=0.5)
        ticks = [0, *(scale for scale in SCALES if scale)]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set(xlabel="scale", ylabel=metric)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


def measure_cost(data, pipelines, steps=20):
    """Measure the time of a step with and without guidance, in turns."""
    labels = torch.arange(64) % NUM_CLASSES
    conditional, unconditional = pipelines["conditional"], pipelines["unconditional"]

    def make_call(pipeline, **guidance_kwargs):
        return lambda: draw_samples(pipeline, labels, steps, **guidance_kwargs)

    seconds = in_turns(
        {
            "unconditional": make_call(unconditional),
            "unconditional, classifier": make_call(unconditional, classifier_scale=1.0),
            "conditional": make_call(conditional),
            "conditional, classifier": make_call(conditional, classifier_scale=1.0),
            "conditional, classifier-free": make_call(conditional, guidance_scale=2.0),
        },
        warmup=1,
    )
    for guided_name, plain_name in (
        ("unconditional, classifier", "unconditional"),
        ("conditional, classifier", "conditional"),
        ("conditional, classifier-free", "conditional"),
    ):
        step_seconds = {"plain": seconds[plain_name], "guided": seconds[guided_name]}
        step_seconds = {key: [value / steps for value in values] for key, values in step_seconds.items()}
        row = {
            "data": data,
            "guidance": guided_name,
            **medians(step_seconds, "ms"),
            "times a step without": ratio(step_seconds, "guided", "plain"),
        }
        record("guidance_cost", "A step of 64 images with guidance and without", row, keys=("data", "guidance"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument(
        "--samples", type=int, default=1000, help="samples for each table row, spread evenly over the classes"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps")
    parser.add_argument(
        "--only",
        choices=["cost", "samples"],
        help="measure only the cost or only the samples; the cost needs an idle machine",
    )
    arguments = parser.parse_args()
    data, name = arguments.data, f"guidance_{arguments.data}"
    pipelines = open_pipelines(data, ROOT / "runs/guidance" / data)
    for pipeline in pipelines.values():
        pipeline.optimize()
    if arguments.only != "samples":
        measure_cost(data, pipelines)
    if arguments.only == "cost":
        return

    def load_split(split):
        images, labels = pixels(split, data)
        return pixels_to_tensor(torch.from_numpy(images)[:, None], LEVELS[data]), torch.from_numpy(labels)

    (x_train, y_train), (x_test, y_test) = load_split("train"), load_split("test")
    judge = train_judge(x_train, y_train)
    with torch.no_grad():
        selected = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))[: arguments.samples]
        real, test_features = judge.features(x_train[selected]), judge.features(x_test)
        accuracy = (judge(x_test).argmax(1) == y_test).double().mean().item()
    precision, recall = precision_recall(real, test_features)
    row = {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "Fréchet distance": frechet_distance(real, test_features),
    }
    rows, sheets, labels = [], {}, torch.arange(arguments.samples) % NUM_CLASSES

    def record_metrics(network, guidance, scale, metrics):
        row = {"network": network, "guidance": guidance, "scale": scale, **metrics}
        row |= {"samples": arguments.samples, "steps": arguments.steps}
        record(name, f"Guidance on {data}", row, keys=("network", "guidance", "scale"))
        return row

    record_metrics("test split", "none", 0.0, row)
    settings = [(network, "classifier", scale) for network in ("unconditional", "conditional") for scale in SCALES]
    settings += [("conditional", "classifier-free", scale) for scale in CLASSIFIER_FREE_SCALES]
    for network, guidance, scale in settings:
        guidance_kwargs = {"classifier_scale": scale} if guidance == "classifier" else {"guidance_scale": scale}
        x_start = draw_samples(pipelines[network], labels, arguments.steps, **guidance_kwargs)
        rows.append(record_metrics(network, guidance, scale, judge_samples(judge, real, x_start, labels)))
        if guidance == "classifier" and scale in SHEET_SCALES:
            sheets[network, scale] = x_start
    plot(rows, RESULTS / f"{name}.png")
    for network in pipelines:
        scale_samples = [
            sheets[network, scale].view(-1, NUM_CLASSES, *x_train.shape[1:])[:SAMPLES_PER_SCALE]
            for scale in SHEET_SCALES
        ]
        sheet = (
            torch.cat(scale_samples).transpose(0, 1).flatten(0, 1)
        )  # one row per class, with the scales side by side
        sheet = as_sheet(as_images(sheet), len(SHEET_SCALES) * SAMPLES_PER_SCALE)
        save_picture(sheet, RESULTS / f"{name}_{network}.png")
    print(f"look at {RESULTS / name}.png and {RESULTS / name}_conditional.png")


if __name__ == "__main__":
    main()
