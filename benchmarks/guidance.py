"""The benefit and cost of guidance on real data: fidelity against diversity by scale (ADM, figure 4), conditional and
unconditional networks (ADM, table 4), and classifier-free guidance.

    python benchmarks/guidance.py digits
    python benchmarks/guidance.py mnist

Trains a conditional network with label dropout, an unconditional one and a classifier of noisy images of the same process
(RUNS below) into runs/guidance/<data>, and a judge: a small network of another kind, trained on clean images of the training
split. Accuracy is the share of samples that the judge assigns to the requested class. Precision, recall (Kynkäänniemi et al.
2019, k = 3) and Fréchet distance compare its last features with those of as many training images. Writes to benchmarks/results:
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
    "--scheduler.variance_type", "fixed_small",  # of few steps; fixed_large leaves noise in them
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
FREE_SCALES = (1.5, 2.0, 3.0, 5.0)
SHOWN = (0.0, 1.0, 8.0)  # scales of the sheet
CLASSES, IN_A_ROW, AT_ONCE = 10, 8, 250


def run(arguments, folder, program="train.py"):
    """The pipeline of a run into `folder`; what is there already is not trained again."""
    if not (folder / "pipeline").exists():
        command = [sys.executable, ROOT / "training" / program, *arguments, "--output_dir", folder]
        subprocess.run([str(word) for word in command], check=True)
    pipeline = DDPMImagePipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained(data, folder):
    """The pipelines "conditional" and "unconditional", with the classifier."""
    arguments = RUNS[data]
    run(arguments["conditional"], folder / "conditional")
    unconditional = run(arguments["unconditional"], folder / "unconditional")
    base = ["--pipeline", folder / "conditional/pipeline"]
    guided = run([*arguments["classifier"], *base], folder / "classifier", "train_classifier.py")
    unconditional.register_modules(classifier=guided.classifier)
    return {"conditional": guided, "unconditional": unconditional}


class Judge(nn.Module):
    """A plain convolutional network with nothing of the package: 64 features, then logits."""

    def __init__(self, side):
        super().__init__()
        layers, channels = [], 1
        for width in (32, 64) if side < 16 else (16, 32, 64):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, side = width, side // 2
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * side * side, 64), nn.ReLU()]
        self.features, self.logits = nn.Sequential(*layers), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.logits(self.features(x))


def judge_of(x_start, labels, seed=0, epochs=30):
    torch.manual_seed(seed)
    judge = Judge(x_start.shape[-1])
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    for _ in tqdm(range(epochs), desc="judge"):
        for part in torch.randperm(len(x_start)).split(64):
            x = F.pad(x_start[part], (1, 1, 1, 1), value=-1.0)  # moved by a pixel at most
            row, column = torch.randint(3, (2,)).tolist()
            x = x[..., row : row + x_start.shape[-2], column : column + x_start.shape[-1]]
            optimizer.zero_grad()
            F.cross_entropy(judge(x), labels[part]).backward()
            optimizer.step()
    return judge.eval()


def draw(pipeline, labels, steps, **how):
    """Samples of these classes, the same noise for every scale."""
    generator, found = torch.Generator().manual_seed(0), []
    nobody_asks = pipeline.unet.num_classes is None and how.get("classifier_scale") is None
    for part in labels.split(AT_ONCE):
        how |= {"class_labels": None if nobody_asks else part, "num_inference_steps": steps, "output_type": "latent"}
        found.append(pipeline(len(part), generator, **how).images.clamp(-1, 1))
    return torch.cat(found)


@torch.no_grad()
def judged(judge, real, x_start, labels):
    features = judge.features(x_start)
    precision, recall = precision_recall(real, features)
    return {
        "accuracy": (judge.logits(features).argmax(1) == labels).double().mean().item(),
        "precision": precision,
        "recall": recall,
        "Fréchet distance": frechet_distance(real, features),
    }


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    kinds = dict.fromkeys((row["network"], row["guidance"]) for row in rows)
    for axis, what in zip(axes, ("accuracy", "precision", "recall", "Fréchet distance")):
        for network, guidance in kinds:
            points = [row for row in rows if (row["network"], row["guidance"]) == (network, guidance)]
            scales = [row["scale"] for row in points]
            axis.plot(scales, [row[what] for row in points], marker="o", label=f"{network}, {guidance}")
        axis.set_xscale("symlog", linthresh=0.5)
        ticks = [0, *(row for row in SCALES if row)]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set(xlabel="scale", ylabel=what)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


def cost(data, pipelines, steps=20):
    """Seconds of a step, guided and not, in turns."""
    labels = torch.arange(64) % CLASSES
    conditional, unconditional = pipelines["conditional"], pipelines["unconditional"]

    def call(pipeline, **how):
        return lambda: draw(pipeline, labels, steps, **how)

    seconds = in_turns(
        {
            "unconditional": call(unconditional),
            "unconditional, classifier": call(unconditional, classifier_scale=1.0),
            "conditional": call(conditional),
            "conditional, classifier": call(conditional, classifier_scale=1.0),
            "conditional, classifier-free": call(conditional, guidance_scale=2.0),
        },
        warmup=1,
    )
    for name, plain in (
        ("unconditional, classifier", "unconditional"),
        ("conditional, classifier", "conditional"),
        ("conditional, classifier-free", "conditional"),
    ):
        pair = {"plain": seconds[plain], "guided": seconds[name]}
        pair = {key: [value / steps for value in values] for key, values in pair.items()}
        row = {
            "data": data,
            "guidance": name,
            **medians(pair, "ms"),
            "times a step without": ratio(pair, "guided", "plain"),
        }
        record("guidance_cost", "A step of 64 images with guidance and without", row, keys=("data", "guidance"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--samples", type=int, default=1000, help="of each row, as many of each class")
    parser.add_argument("--steps", type=int, default=100, help="network calls an image")
    parser.add_argument("--only", choices=["cost", "samples"], help="one half of it; the cost wants an idle machine")
    arguments = parser.parse_args()
    data, name = arguments.data, f"guidance_{arguments.data}"
    pipelines = trained(data, ROOT / "runs/guidance" / data)
    for pipeline in pipelines.values():
        pipeline.optimize()
    if arguments.only != "samples":
        cost(data, pipelines)
    if arguments.only == "cost":
        return

    def tensors(split):
        images, labels = pixels(split, data)
        return pixels_to_tensor(torch.from_numpy(images)[:, None], LEVELS[data]), torch.from_numpy(labels)

    (x_train, y_train), (x_test, y_test) = tensors("train"), tensors("test")
    judge = judge_of(x_train, y_train)
    with torch.no_grad():
        some = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))[: arguments.samples]
        real, others = judge.features(x_train[some]), judge.features(x_test)
        right = (judge(x_test).argmax(1) == y_test).double().mean().item()
    precision, recall = precision_recall(real, others)
    row = {
        "accuracy": right,
        "precision": precision,
        "recall": recall,
        "Fréchet distance": frechet_distance(real, others),
    }
    rows, sheets, labels = [], {}, torch.arange(arguments.samples) % CLASSES

    def tell(network, guidance, scale, found):
        row = {"network": network, "guidance": guidance, "scale": scale, **found}
        row |= {"samples": arguments.samples, "steps": arguments.steps}
        record(name, f"Guidance on {data}", row, keys=("network", "guidance", "scale"))
        return row

    tell("test split", "none", 0.0, row)
    asked = [(network, "classifier", scale) for network in ("unconditional", "conditional") for scale in SCALES]
    asked += [("conditional", "classifier-free", scale) for scale in FREE_SCALES]
    for network, guidance, scale in asked:
        how = {"classifier_scale": scale} if guidance == "classifier" else {"guidance_scale": scale}
        x_start = draw(pipelines[network], labels, arguments.steps, **how)
        rows.append(tell(network, guidance, scale, judged(judge, real, x_start, labels)))
        if guidance == "classifier" and scale in SHOWN:
            sheets[network, scale] = x_start
    plot(rows, RESULTS / f"{name}.png")
    for network in pipelines:
        parts = [sheets[network, scale].view(-1, CLASSES, *x_train.shape[1:])[:IN_A_ROW] for scale in SHOWN]
        sheet = torch.cat(parts).transpose(0, 1).flatten(0, 1)  # a row for each class, scales one after the other
        sheet = as_sheet(as_images(sheet), len(SHOWN) * IN_A_ROW)
        save_picture(sheet, RESULTS / f"{name}_{network}.png")
    print(f"look at {RESULTS / name}.png and {RESULTS / name}_conditional.png")


if __name__ == "__main__":
    main()
