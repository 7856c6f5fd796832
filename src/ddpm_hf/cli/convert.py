"""`ddpm-hf convert`: a checkpoint of another code base -> a saved pipeline, and back."""

import contextlib
from pathlib import Path

from ddpm_hf.cli.parser import Parser, hide_progress_in_logs, json_or_text
from ddpm_hf.errors import UserError
from ddpm_hf.files.missing import did_you_mean_path, pipeline_of_run
from ddpm_hf.original.options import OPTIONS, OPTIONS_OF

DTYPES = ("float32", "float16", "bfloat16")


def make_parser(program: str = "ddpm-hf convert") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        f"FILE --out FOLDER [--OPTION VALUE ...]\n       {program} FOLDER --to FORMAT FILE",
        "Save a checkpoint of guided-diffusion, improved-diffusion, pytorch_diffusion, ddim, diffusion (TensorFlow) or "
        "score_sde_pytorch as a pipeline whose network gives the same outputs. Published files under their own names need no "
        "options. With --to, write the network of a saved pipeline as such a checkpoint.",
        [
            ("256x256_diffusion_uncond.pt --out adm-256", "a published file"),
            ("256x256_diffusion.pt --classifier 256x256_classifier.pt --out adm-256-guided", "with its classifier"),
            ("checkpoint_8.pth --like vp/cifar10_ddpmpp_continuous --out ddpmpp", "a file without a telling name"),
            ("adm-256 --to guided-diffusion out.pt", "back to the original format"),
        ],
    )
    add = parser.group("what to convert")
    add(
        "source",
        metavar="FILE",
        help="checkpoint: .pt, .pth, .ckpt, .safetensors, .npz, a folder of .npy, or the address of a file on the Hub; with "
        "--to, the folder of a saved pipeline, of its run or of a classifier",
    )
    add("--out", metavar="FOLDER", help="new folder of the saved pipeline")
    add(
        "--like",
        metavar="NAME",
        help="published checkpoint of the same configuration (recognized by the names of the file and its folder)",
    )
    add(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="averaged weights if the file has them, or raw ones (ema)",
    )
    add("--dtype", choices=DTYPES, help="dtype of the saved weights (that of the file)")
    add("--classifier", metavar="FILE", help="classifier for classifier guidance: a checkpoint, or a saved folder")
    add(
        "--to",
        nargs=2,
        metavar=("FORMAT", "FILE"),
        help="write the network as a checkpoint; FORMAT is a code base named above, such as guided-diffusion",
    )
    add("-h", "--help", action="help", help="show this and stop")
    add = parser.group("where to publish")
    add("--push", metavar="USER/NAME", help="publish the pipeline on the Hub")
    add("--private", action="store_true", help="create the repository for its owner only")
    added: set[str] = set()
    for code_bases, options in OPTIONS_OF.items():
        add = parser.group(f"what the file does not say (flags of {code_bases})")
        for name, option in options.items():
            if name not in added:  # diffusion_steps is a flag of two code bases
                add(f"--{name}", metavar="VALUE", type=json_or_text, help=option.help)
                added.add(name)
    return parser


def main(argv: list[str], program: str) -> None:
    arguments = make_parser(program).parse_args(argv)
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    source = Path(arguments.source)
    if "://" not in arguments.source and not source.exists():
        raise UserError(f"there is no file {arguments.source!r} here{did_you_mean_path(source)}")
    if (arguments.to is None) == (arguments.out is None):
        raise UserError("give either --out FOLDER or --to FORMAT FILE")
    if arguments.private and not arguments.push:
        raise UserError("--private is for the repository of --push USER/NAME; give both, or neither")
    if arguments.to is not None:
        for name in ("like", "dtype", "classifier", "push"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} is for --out; leave it out with --to")
        format, path = arguments.to
        return _write_original(pipeline_of_run(source) or source, format, path, options)
    out = Path(arguments.out)
    if out.exists():
        raise UserError(f"--out {arguments.out} exists; give a new folder")
    _save_pipeline(arguments, out, options)


def _write_original(folder, format, path, options):
    from ddpm_hf.files.atomic import check_output_folder
    from ddpm_hf.files.pipeline_folder import read_config
    from ddpm_hf.models.classifier import NoisyClassifier
    from ddpm_hf.models.unet import DDPMUNet

    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise UserError(f"--to {format} {path} must be a file in a folder that exists")
    check_output_folder(Path(path).parent, f"the folder of {path}")
    hide_progress_in_logs()
    if (folder / "model_index.json").is_file():
        folder = folder / "unet"
    is_classifier = read_config(folder / "config.json").get("_class_name") == "NoisyClassifier"
    cls = NoisyClassifier if is_classifier else DDPMUNet
    network = cls.from_pretrained(folder, torch_dtype=_saved_dtype(folder))
    network.save_single_file(path, format, **options)
    print(f"{_summary(network)} -> {path}, a checkpoint of {format}")


def _saved_dtype(folder):
    """The dtype of the weights in a folder, of the first tensor; None if none can be read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with contextlib.suppress(SafetensorError), safe_open(path, "pt") as file:
            return file.get_tensor(next(iter(file.keys()))).dtype
    return None


def _save_pipeline(arguments, out, options):
    import torch

    from ddpm_hf.files.atomic import check_output_folder, full_disk_as_oserror, replacing_folder
    from ddpm_hf.models.classifier import NoisyClassifier
    from ddpm_hf.original.checkpoint import open_original
    from ddpm_hf.pipelines.ddpm import DDPMImagePipeline
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    check_output_folder(out, f"--out {out}")
    hide_progress_in_logs()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    original = open_original(arguments.source, arguments.like, arguments.weights, **options)
    if original.description.network == "NoisyClassifier":
        if arguments.push or arguments.classifier:
            raise UserError(
                f"{arguments.source} is a classifier; give it as --classifier beside the model that it guides"
            )
        saved = network = NoisyClassifier.from_original(original, dtype)
    else:
        classifier = None if arguments.classifier is None else _open_classifier(arguments.classifier, dtype, options)
        upsamples = original.description.low_resolution is not None
        cls = DDPMSuperResolutionPipeline if upsamples else DDPMImagePipeline
        saved = cls.from_original(original, dtype, classifier)
        network = saved.unet
    if arguments.push:
        from ddpm_hf.hub.upload import check_repository, push_folder

        check_repository(arguments.push, private=arguments.private or None)
    with replacing_folder(out) as folder, full_disk_as_oserror(out):
        saved.save_pretrained(folder)
    print(f"{_summary(network)} -> {out}, a {type(saved).__name__}")
    if saved is not network:
        print(f"{type(saved.scheduler).__name__}; plain diffusers {_in_plain_diffusers(saved)}")
    if arguments.push:
        info = push_folder(out, arguments.push, private=arguments.private or None)
        print(f"published {info.commit_url}")


def _in_plain_diffusers(pipe):
    if not pipe.is_stock:
        return "opens it only with trust_remote_code=True"
    if pipe.unet.class_embedding is not None:
        return "opens it, but cannot sample from it: the network needs class labels"
    return "opens it"


def _open_classifier(path, dtype, options):
    from ddpm_hf.models.classifier import NoisyClassifier

    if (Path(path) / "config.json").is_file():
        return NoisyClassifier.from_pretrained(path, torch_dtype=dtype)
    return NoisyClassifier.from_single_file(path, torch_dtype=dtype, **options)


def _summary(network):
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters:,} parameters, {str(network.dtype).removeprefix('torch.')}"
