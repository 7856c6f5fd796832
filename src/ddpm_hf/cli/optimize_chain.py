"""`ddpm-hf optimize-chain`: a saved pipeline and images -> the same pipeline with the best variances and lists of timesteps."""

import json
from pathlib import Path

from ddpm_hf.cli.evaluate import BATCH, READING, add_image_options, open_data
from ddpm_hf.cli.parser import SEED, Parser, check_path, choose_device, find_pipeline, hide_progress_in_logs, number
from ddpm_hf.errors import UserError
from ddpm_hf.extras import require_extra

VARIANCES = ("analytic", "fixed_small", "fixed_large", "learned_range")


def make_parser(program: str = "ddpm-hf optimize-chain") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        "PIPELINE --out FOLDER [--OPTION VALUE ...]",
        "Compute, from the variational bound and without training, the variances of the reverse process (Analytic-DPM, Bao et "
        "al. 2022) and the lists of timesteps (Watson et al. 2021) that fit a trained network best. Prints bits/dim of even, "
        "quadratic, cosine-spaced and optimal lists with each variance; saves the pipeline with them, a table and a plot.",
        [
            ("runs/digits/pipeline --out digits-fast", "lists of 10, 25, 50 and 100 steps"),
            ("runs/digits/pipeline --data digits --steps 5,20 --out digits-fast", ""),
        ],
    )
    add = parser.group("pipeline and output")
    add("pipeline", metavar="PIPELINE", help="folder of a saved pipeline or of its run, or its id on the Hub")
    add("--out", metavar="FOLDER", required=True, help="new folder of the pipeline, with chains.json and chains.png")
    add("-h", "--help", action="help", help="show this and stop")
    images = {
        "type": number(int, 2),
        "metavar": "N",
        "default": 256,
        "help": "a fixed random subset of --data (%(default)s)",
    }
    add_image_options(parser.group("images"), images, "train")
    add = parser.group("chains")
    add("--steps", metavar="LIST", default="10,25,50,100", help="numbers of steps of the lists (%(default)s)")
    add("--variance", choices=VARIANCES, help="variance type of the saved pipeline (that with the lowest bound)")
    add = parser.group("computation")
    add("--evaluations", type=number(int, 2), metavar="N", default=100, help="network calls per image (%(default)s)")
    add("--batch_size", type=number(int, 1), metavar="N", default=BATCH, help="images per network call (%(default)s)")
    add("--seed", type=SEED, metavar="N", default=0, help="seed of the noise (%(default)s)")
    add("--device", metavar="NAME", help="device, as torch names it (an accelerator if there is one)")
    return parser


def main(argv: list[str], program: str) -> None:
    parser = make_parser(program)
    arguments = parser.parse_args(argv)
    steps = _numbers(parser, arguments.steps)
    require_extra("datasets", "data", "images of a data set")
    require_extra("matplotlib", "eval", "plots")
    arguments.pipeline = find_pipeline(program, arguments.pipeline)
    if arguments.data is not None:
        check_path(program, arguments.data, "data set")
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out {arguments.out} exists; give a new folder")

    import torch

    from ddpm_hf.evaluation import chain_report, images
    from ddpm_hf.files.atomic import check_output_folder, replacing_folder, write_text
    from ddpm_hf.likelihood.bound import check_scheduler
    from ddpm_hf.likelihood.chains import measure_denoising_errors
    from ddpm_hf.pipelines.ddpm import DDPMImagePipeline

    hide_progress_in_logs()
    check_output_folder(out, f"--out {out}")
    device = choose_device(arguments.device)
    pipeline = DDPMImagePipeline.from_pretrained(arguments.pipeline).to(device)
    scheduler = pipeline.scheduler
    check_scheduler(scheduler)
    T = scheduler.config.num_train_timesteps
    if max(steps) > T:
        raise UserError(f"--steps {arguments.steps}: the process has {T} timesteps; give fewer")
    levels = scheduler.levels if arguments.levels is None else arguments.levels
    arguments.split, arguments.histogram = arguments.split or "train", None
    dataset, *_ = open_data(arguments, pipeline, levels)
    reading = {name: getattr(arguments, name) for name in READING}
    x_start, labels = images.read_tensor(
        dataset, pipeline.unet, levels, arguments.images, **reading, source=arguments.data
    )
    errors = measure_denoising_errors(
        pipeline.unet,
        scheduler,
        x_start.to(device),
        num_evaluations=min(arguments.evaluations, T),
        class_labels=None if labels is None else labels.to(device),
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=arguments.batch_size,
        levels=levels,
        progress_bar=True,
    )
    report = chain_report.compare_chains(errors, steps)
    if arguments.variance is not None and arguments.variance not in report.optimal:
        raise UserError(
            f"--variance {arguments.variance}: this network has {', '.join(report.optimal)}; choose one of them"
        )
    print(
        f"bits/dim on {len(x_start)} images ({arguments.data}, {arguments.split}), {errors.evaluations:,} network calls:"
    )
    print("\n".join(report.lines()))
    variance_type = arguments.variance or report.best_variance_type
    pipeline.scheduler = report.scheduler(variance_type)
    with replacing_folder(out) as folder:
        pipeline.save_pretrained(folder)
        write_text(folder / "chains.json", json.dumps(report.rows, indent=2) + "\n")
        chain_report.plot_chains(report, folder / "chains.png")
    print(
        f'wrote {out}, variance {variance_type}; pipe(num_inference_steps={steps[0]}, timesteps="optimal") samples with it'
    )


def _numbers(parser, text):
    try:
        steps = sorted({int(word) for word in text.split(",")})
    except ValueError:
        steps = [0]
    if steps[0] < 1:
        parser.error(f"--steps {text[:40]} must be numbers of steps, 1 or more, separated by commas")
    return steps
