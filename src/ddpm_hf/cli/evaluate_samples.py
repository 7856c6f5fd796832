"""`ddpm-hf evaluate --metrics`: samples and real images -> FID and its kin, with their errors."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

from ddpm_hf.cli.parser import Parser, check_path, choose_device, find_pipeline, hide_progress_in_logs, naming_options
from ddpm_hf.cli.sampling import OPTIONS, class_rule, sampler_of
from ddpm_hf.extras import require_extra

EXTRACTION_BATCH = 64


def run(parser: Parser, arguments: argparse.Namespace, command_of) -> None:
    """Draw or read samples, compare them with real images, print a table, and write it.

    Args:
        command_of: makes the shell command that repeats the measurement.
    """
    from ddpm_hf.evaluation.quality import parse_metrics

    by_extractor = parse_metrics(arguments.metrics, arguments.extractor)
    check_choices(parser, arguments)
    require_extra("datasets", "data", "images of a data set")
    if arguments.pipeline is not None:
        arguments.pipeline = find_pipeline(parser.prog, arguments.pipeline)
    if arguments.data is not None:
        check_path(parser.prog, arguments.data, "data set")

    from ddpm_hf.evaluation import report_folder
    from ddpm_hf.evaluation.features.extraction import extract
    from ddpm_hf.evaluation.features.extractors import open_extractor
    from ddpm_hf.evaluation.processes import Processes
    from ddpm_hf.evaluation.quality import LEGEND, check_needs, measure, table
    from ddpm_hf.evaluation.quality_pictures import quality_pictures

    hide_progress_in_logs()
    if arguments.out is not None:
        report_folder.check_out(arguments.out)
    processes = Processes.launched()
    device = processes.device if processes.device and arguments.device is None else choose_device(arguments.device)
    # opened first, so that their mistakes are said before anything is drawn
    extractors = {spec: open_extractor(spec, device) for spec in by_extractor}
    pipeline, folder = None, None if arguments.out is None else Path(arguments.out)
    if arguments.pipeline is not None:
        pipeline = open_with_scheduler(arguments, device)
        folder = folder or report_folder.own_folder(arguments.pipeline)
    given = None if arguments.samples is not None else open_given_images(arguments, pipeline)
    real_images = open_real_images(arguments, pipeline, given)
    references = {
        spec: reference_for(arguments, real_images, extractor, processes) for spec, extractor in extractors.items()
    }
    for spec, kinds in by_extractor.items():
        check_needs(kinds, extractors[spec], references[spec], arguments.samples if given is None else len(given))
    sampler = ""
    if given is None:
        given, sampler = draw(parser, arguments, pipeline, folder, processes)
    metrics: list[dict] = []
    lines: list[str] = []
    pictures: dict = {}
    for spec, kinds in by_extractor.items():
        references[spec].check(given)
        features = extract(given, extractors[spec], EXTRACTION_BATCH, processes)
        began = time.perf_counter()
        rows, compared = measure(kinds, extractors[spec], references[spec], features, processes)
        if processes.is_main and folder is not None and not pictures:
            pictures = quality_pictures(given, real_images, references[spec], features["features"], compared)
        facts = {name: getattr(extractors[spec], name) for name in ("digest", "resizing")}
        metrics += [{**as_json(row), "extractor": extractors[spec].name, **facts} for row in rows]
        lines += [f"features of {extractors[spec].name}; resizing: {extractors[spec].resizing}", *table(rows)]
        if processes.is_main and time.perf_counter() - began > 60:
            print(f"{extractors[spec].name}: the metrics took {time.perf_counter() - began:.0f} s")
    if processes.is_main:
        real = next(iter(references.values())).description
        print(f"generated: {in_words(given.description)}{f', {sampler}' if sampler else ''}")
        print(f"real:      {in_words(real)}")
        print("\n".join([*lines, *LEGEND]))
        quality = {
            "data": real["images"],
            "split": real.get("split"),
            "command": command_of(parser, arguments),
            "sampler": sampler or None,
            "generated": given.description,
            "real": real,
            "metrics": metrics,
        }
        if folder is None:
            print("not written; give --out FOLDER for evaluation.json")
        else:
            report_folder.write_quality(folder, arguments.pipeline or "", quality, pictures)
    processes.wait()
    processes.leave()


def check_choices(parser: Parser, arguments: argparse.Namespace) -> None:
    """End the command if it is not clear which images are compared."""
    if (arguments.samples is None) == (not isinstance(arguments.images, str)):
        parser.error(
            "--metrics need --samples N (50000 in most papers), or --images FOLDER of samples; give one of them"
        )
    if arguments.pipeline is None and arguments.samples is not None:
        parser.error(f"--samples {arguments.samples} needs a PIPELINE that draws them; give one, or --images FOLDER")
    if arguments.pipeline is None and arguments.data is None and arguments.reference is None:
        parser.error("give the real images: --data, or --reference")
    if arguments.data is not None and arguments.reference is not None:
        parser.error("--data and --reference are both real images; give one of them")


def open_with_scheduler(arguments: argparse.Namespace, device: str):
    """The pipeline on its device, with the scheduler that the options ask for."""
    from ddpm_hf.evaluation.generation import stages_of
    from ddpm_hf.evaluation.samples import open_pipeline
    from ddpm_hf.evaluation.scheduler_by_name import use_scheduler

    pipeline = open_pipeline(arguments.pipeline).to(device)
    if arguments.scheduler or arguments.scheduler_settings:
        use_scheduler(pipeline, arguments.scheduler, arguments.scheduler_settings)
    if arguments.optimize and arguments.samples is not None:
        for stage in stages_of(pipeline):
            print(stage.optimize())
    return pipeline


def open_given_images(arguments: argparse.Namespace, pipeline):
    """The `ImageSet` of --images.

    Raises:
        ValueError: also for samples that other weights than the pipeline's drew, whose numbers its card would show.
    """
    from ddpm_hf.evaluation.generation import stages_of, weights_fingerprint
    from ddpm_hf.evaluation.image_sets import open_images
    from ddpm_hf.evaluation.sample_files import read_record

    images = open_images(arguments.images, "--images")
    record = read_record(Path(arguments.images)) if pipeline is not None else None
    if record and record.get("weights") != weights_fingerprint(stages_of(pipeline)):
        raise ValueError(
            f"--images {arguments.images} was drawn with other weights than those of {arguments.pipeline}; draw it anew, or "
            "leave out the pipeline"
        )
    return images


def open_real_images(arguments: argparse.Namespace, pipeline, given):
    """The `ImageSet` of --data, prepared as for the pipeline's training; without one, in the size of the given images.

    Of --reference its images; None if it has none. Also sets --data and --split if they were left out.
    """
    import torch

    from ddpm_hf.data.dataset import held_out_rows
    from ddpm_hf.data.sources import LEVELS, check_levels, load_images, public_name
    from ddpm_hf.evaluation.image_sets import DataImages, open_images
    from ddpm_hf.evaluation.report_folder import data_of, trained_split
    from ddpm_hf.models.unet import DDPMUNet

    if arguments.reference is not None:
        try:
            return open_images(arguments.reference, "--reference")
        except ValueError:
            return None  # statistics, which `read_reference` checks
    if pipeline is not None:
        last = getattr(pipeline, "upsampler", pipeline)
        unet, levels, channels = last.unet, getattr(last.scheduler, "levels", 256), last.channels
        arguments.data = arguments.data or data_of(arguments.pipeline, pipeline.folder)
        arguments.split = arguments.split or trained_split(pipeline.folder or arguments.pipeline, arguments.data)
    else:
        with torch.device("meta"):  # for its size alone
            unet = DDPMUNet(sample_size=given.size, in_channels=given.channels, out_channels=given.channels)
        levels, channels = LEVELS.get(arguments.data, 256), given.channels
    levels = levels if arguments.levels is None else arguments.levels
    check_levels(arguments.data, levels)
    dataset = load_images(arguments.data, arguments.split or "train")
    if arguments.held_out:
        dataset = dataset.select(held_out_rows(arguments.held_out, len(dataset))[0])
    reading = {name: getattr(arguments, name) for name in ("image_column", "max_broken", "max_image_pixels")}
    return DataImages(
        dataset,
        unet,
        levels,
        arguments.images if isinstance(arguments.images, int) else None,
        data=public_name(arguments.data),
        split=arguments.split or "train",
        channels=channels,
        **reading,
    )


def reference_for(arguments: argparse.Namespace, real_images, extractor, processes):
    """The `Reference` of an extractor."""
    from ddpm_hf.evaluation.features.reference import read_reference, reference_of

    if arguments.reference is not None:
        return read_reference(arguments.reference, extractor, EXTRACTION_BATCH, processes)
    return reference_of(real_images, extractor, EXTRACTION_BATCH, processes)


def draw(parser: Parser, arguments: argparse.Namespace, pipeline, folder: Path | None, processes) -> tuple[Any, str]:
    """Draw the samples, or find those of an earlier call; return their `ImageSet` and the sampler in words.

    They are kept beside the report, or without one in the cache.
    """
    from huggingface_hub import cached_assets_path

    from ddpm_hf.data.sources import public_path
    from ddpm_hf.evaluation.generation import Generator, generate
    from ddpm_hf.evaluation.image_sets import open_images
    from ddpm_hf.evaluation.sample_files import SampleFolder, record_key
    from ddpm_hf.evaluation.seeds import seeds_from
    from ddpm_hf.pipelines.super_resolution import DDPMSuperResolutionPipeline

    if isinstance(pipeline, DDPMSuperResolutionPipeline):
        parser.error("samples of an upsampler are drawn by ddpm-hf sample --out FOLDER/; then give --images FOLDER")
    name, seeds = public_path(arguments.pipeline), seeds_from(arguments.seed, arguments.samples)
    settings = dict(class_labels=class_rule(parser, pipeline, arguments.class_labels), **sampler_of(arguments))
    with naming_options(arguments, OPTIONS):
        record = Generator(pipeline, **settings).record(name)
        key = f"samples-{record_key(record)}"
        if folder is None:
            out = cached_assets_path("ddpm-hf", "samples", key)
        else:
            out = (folder.parent if folder.name == "pipeline" else folder) / key
            out.parent.mkdir(exist_ok=True)
        generate(pipeline, seeds, out, batch_size=arguments.batch_size, name=name, processes=processes, **settings)
    if processes.is_main:
        print(f"the samples are in {out}")
    words = [f"{record['steps']} steps of {record['schedulers'][0]['_class_name']}"]
    words += [
        f"{key}={record[key]}"
        for key in ("eta", "timesteps", "guidance_scale", "classifier_scale", "class_labels")
        if key in record
    ]
    files = SampleFolder(out, record)
    images = open_images(out, "samples", names=[files.path(seed).name for seed in seeds])
    return images, ", ".join([*words, f"seeds {seeds[0]} to {seeds[-1]}"])


def as_json(row) -> dict[str, Any]:
    """A `Measurement` as evaluation.json has it."""

    def finite(value):
        return None if math.isnan(value) else value

    limit = row.at_infinity and {
        "value": row.at_infinity.value,
        "standard_error": finite(row.at_infinity.standard_error),
    }
    return {**vars(row), "standard_error": finite(row.standard_error), "at_infinity": limit}


def in_words(description: dict[str, Any]) -> str:
    """Images in words."""
    text = description["images"]
    if description.get("split"):
        text += f", split {description['split']}"
    if description.get("count"):
        text += f", {description['count']:,} images"
    if description.get("size"):
        height, width = description["size"]
        text += f" of {width}x{height}, {description['channels']} channel{'s' if description['channels'] > 1 else ''}"
    return text
