"""Selects and checks the files of a saved pipeline that are published on the Hub."""

import os
from pathlib import Path

import torch
from safetensors import safe_open

from ddpm_hf.files.guarded import PICTURE_BYTES, check_file, naming, read_json, read_text
from ddpm_hf.files.pipeline_folder import component_classes, pipeline_class, read_config, read_shards, variants_in
from ddpm_hf.files.saved_config import sorted_json
from ddpm_hf.hub.records import RECORD, records_of
from ddpm_hf.hub.saved import CASCADE, IMAGE, NETWORKS, kind_of_folder, own_sources


def published_files(folder: Path, pipeline_folder: Path | None = None) -> dict[str, Path | bytes]:
    """Returns the files to publish: path in the repository -> file, or its content.

    Args:
        folder: the pipeline's folder.
        pipeline_folder: the cascade's folder, if `folder` is one of its stages.

    Raises:
        ValueError: a file is missing, inconsistent with others, too large, not a regular file, or a link to outside of the
            folder; the message names the file and what to do.
    """
    root = pipeline_folder or folder
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no pipeline: it has no model_index.json; give what save_pretrained wrote, such as a run's pipeline/"
        )
    index = read_json(folder / "model_index.json", root)
    kind = kind_of_folder(index, folder)
    source = read_text(folder / "pipeline.py", root) if os.path.lexists(folder / "pipeline.py") else ""
    if kind is None or f"class {kind.name}(" not in source:
        raise ValueError(
            f"{folder} was not saved by {IMAGE.name} (its index says {pipeline_class(index, folder)}): open it with "
            f"{IMAGE.name}.from_pretrained and save it again"
        )
    texts = [name for name in ("pipeline.py", "README.md", "LICENSE") if os.path.lexists(folder / name)]
    files = {name: check_file(folder / name, root) for name in texts}
    if kind is CASCADE:
        for stage in kind.components:
            files |= {f"{stage}/{name}": file for name, file in published_files(folder / stage, root).items()}
        return files | {"model_index.json": folder / "model_index.json"}
    classes = component_classes(index, folder, kind.components)
    for name in classes:
        files |= _files_of_part(folder / name, own_sources(index).get(name), root)
    class_name = kind.saved_name(index, read_config(folder / "scheduler/scheduler_config.json", root))
    files["model_index.json"] = sorted_json({**index, "_class_name": class_name}).encode()
    records = records_of(folder, root)
    for path in folder.iterdir():
        record = "training" if path.stem in ("samples", "animation") else path.stem
        if RECORD.fullmatch(path.name) and records.get(record, path) is not None:
            files[path.name] = check_file(path, root, PICTURE_BYTES)
    return files


def _files_of_part(folder, source, root):
    """Returns the config of a network or scheduler, its weights, and its source file if it has one."""
    network = NETWORKS.get(folder.name)
    names = ["config.json" if network else "scheduler_config.json", *([source] if source else [])]
    for name in names:
        if not os.path.lexists(folder / name):
            missing = name if name == source else "config"
            raise ValueError(f"{folder} has no {missing}, but model_index.json names it; save the pipeline again")
    read_config(folder / names[0], root)
    paths = [check_file(folder / name, root) for name in names]
    if network:
        _check_weights(folder, network, root)
        paths += [path for variant in variants_in(folder).values() for path in variant]
    return {f"{folder.name}/{path.name}": path for path in paths}


def _check_weights(folder, cls, root):
    """Raises ValueError if a network's weights are not safetensors or do not fit its config."""
    with naming(folder / "config.json"), torch.device("meta"):
        network = cls.from_config(read_config(folder / "config.json", root))
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    variants = variants_in(folder)  # "diffusion_pytorch_model.fp16" -> its files
    if not variants:
        pickled = next(folder.glob("*.bin"), None)
        problem = f"{pickled} is a pickle, which is not published" if pickled else f"{folder} holds no weights"
        raise ValueError(f"{problem}; open the pipeline and save it with save_pretrained, which writes safetensors")
    for variant, paths in variants.items():
        indices = [path for path in paths if path.suffix == ".json"]
        shards = {path.name for path in paths} - {path.name for path in indices}
        indexed = set(read_shards(indices[0], root).values()) if indices else {f"{variant}.safetensors"}
        if shards != indexed:
            raise ValueError(
                f"{folder / variant}*: {', '.join(sorted(shards ^ indexed)[:3])} do not belong together; save the pipeline to "
                "an empty folder"
            )
        shapes = {}
        for name in shards:
            path = check_file(folder / name, root, None)
            with naming(path), safe_open(path, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if shapes != expected:
            name = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))[0]
            raise ValueError(
                f"{folder / variant} holds {name[:80]!r} of shape {shapes.get(name)}, its config.json asks for "
                f"{expected.get(name)}; they are of different networks, save the pipeline again"
            )
