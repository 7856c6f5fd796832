"""Features and statistics of real images: computed once and stored, or read from statistics files of other projects."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from huggingface_hub import cached_assets_path

from ddpm_hf.evaluation.features.extraction import extract
from ddpm_hf.evaluation.features.extractors import Extractor
from ddpm_hf.evaluation.image_sets import ImageSet, open_images
from ddpm_hf.evaluation.metrics.frechet import Moments
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.files.atomic import replacing_file
from ddpm_hf.files.guarded import one_line
from ddpm_hf.version import __version__

STORED = ("features", "spatial")
FACTS = "facts"  # key in the metadata of a stored file
MOST_MEMBER_BYTES = 4 * 2**30  # of an array in a statistics file: 500,000 features of 2,048 in float32


@dataclasses.dataclass
class Reference:
    """What real images look like to an extractor.

    Attributes:
        description: facts for records, such as data set, split, count, size and extractor.
        count: number of images; None if the file does not say it.
        features: (N, D) float32, or None where only moments are known, which the Fréchet distance needs and KID, precision
            and recall do not find enough.
        spatial: (N, 2023) float32, for sFID, or None.
        moments, spatial_moments: mean and covariance of all images that they were computed from, or None. An ADM file may have
            moments of more images than it has features.
        size: (height, width) of the images, or None if it is not known.
    """

    description: dict[str, Any]
    count: int | None
    features: torch.Tensor | None = None
    spatial: torch.Tensor | None = None
    given_moments: Moments | None = None
    given_spatial_moments: Moments | None = None
    size: tuple[int, int] | None = None

    @functools.cached_property
    def moments(self) -> Moments | None:
        return self.given_moments or (None if self.features is None else Moments.of(self.features))

    @functools.cached_property
    def spatial_moments(self) -> Moments | None:
        return self.given_spatial_moments or (None if self.spatial is None else Moments.of(self.spatial))

    def check(self, images: ImageSet | None = None) -> None:
        """Raise ValueError if generated images have another size than the real ones."""
        if images is not None and self.size is not None and images.size != self.size:
            name, (height, width) = self.description["images"], self.size
            raise ValueError(
                f"{images.description['images']} has images of {images.size[1]}x{images.size[0]}, the reference {name} of "
                f"{width}x{height}; take a reference of the same size"
            )


def reference_of(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    processes: Processes | None = None,
    progress: bool = True,
    folder: str | os.PathLike | None = None,
) -> Reference:
    """Return the features of real images, computed now or found from an earlier call.

    They are found again by all facts together: the images' description (data, split, count, size, channels, preparation and
    fingerprint), the extractor's name, digest and resizing, and the version of this package. A damaged file is computed again.

    Args:
        batch_size, processes, progress: see `extract`. Every process gets the reference; the main one stores it.
        folder: where it is stored; None for huggingface_hub's cache of assets.
    """
    processes = processes or Processes()
    facts = {
        **images.description,
        "extractor": extractor.name,
        "digest": extractor.digest,
        "resizing": extractor.resizing,
        "version": __version__,
    }
    path = _stored_path(facts, folder)
    values = _read_stored(path, facts)
    # nobody writes before everyone has looked, and they compute if one of them has not found it
    if not processes.gather(torch.tensor([values is not None])).all():
        values = {
            key: value
            for key, value in extract(images, extractor, batch_size, processes, progress).items()
            if key in STORED
        }
        if processes.is_main:
            _store(path, values, facts)
    return Reference(facts, len(images), values["features"], values.get("spatial"), size=images.size)


def _stored_path(facts, folder):
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    if folder is None:
        folder = cached_assets_path(library_name="ddpm-hf", namespace="features", subfolder=facts["extractor"])
    return Path(folder) / f"{key}.safetensors"


def _read_stored(path, facts):
    """The stored tensors; None if they are not there, damaged, or of other facts."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get(FACTS, "{}")) != facts:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError):
        return None


def _store(path, values, facts):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            values = {key: value.contiguous() for key, value in values.items()}
            safetensors.torch.save_file(values, temporary, {FACTS: json.dumps(facts)})
    except (OSError, safetensors.SafetensorError) as error:  # the features are there: go on
        print(f"the features of the real images are not stored: {one_line(error)}", file=sys.stderr)


def read_reference(
    path: str | os.PathLike,
    extractor: Extractor,
    batch_size: int = 64,
    processes: Processes | None = None,
    progress: bool = True,
) -> Reference:
    """Read a statistics file of another project: an .npz of ADM, pytorch-fid or score_sde.

    `mu` and `sigma` (ADM, pytorch-fid) allow the Fréchet distance alone, with ADM's `mu_s` and `sigma_s` also sFID. `pool_3`
    (score_sde) are features, which allow all metrics; `arr_0` (ADM) are images, whose features `reference_of` computes. Moments
    that a file gives are used as they are: ADM's are of all training images, its `arr_0` of some of them.

    Args:
        extractor: that of the generated images. Only `arr_0` works with all; statistics are taken for those of Inception.
        batch_size, processes, progress: see `extract`.

    Raises:
        ValueError: no such file, another layout, or statistics that do not fit the extractor. Nothing is unpickled.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() != ".npz" or not path.is_file():
        problem = "must be an .npz of statistics or images" if path.is_file() else "is not there"
        raise ValueError(f"the reference {path} {problem}; give a file of ADM, pytorch-fid or score_sde")
    arrays = _arrays(path)
    if not arrays & {"mu", "pool_3", "arr_0"}:
        raise ValueError(
            f"{path} has {', '.join(sorted(arrays)[:8]) or 'nothing'}; a reference has mu and sigma, pool_3, or arr_0 (images)"
        )
    is_inception = extractor.name.startswith("inception")
    images = open_images(path, "reference") if "arr_0" in arrays else None
    if not is_inception and images is None:
        raise ValueError(
            f"{path} holds statistics of Inception features, but the extractor is {extractor.name}; give the inception "
            "extractor, or images"
        )
    if images is not None:
        reference = reference_of(images, extractor, batch_size, processes, progress)
    else:
        reference = Reference({"images": path.name, "extractor": "inception"}, None)
    if not is_inception:
        return reference
    if "pool_3" in arrays:
        reference.features = torch.from_numpy(_finite(path, "pool_3", 2).astype(np.float32))
        reference.count = len(reference.features)
        reference.description["count"] = reference.count
        _check_dimension(path, "pool_3", reference.features.shape[1], extractor.dimension)
    if "mu" in arrays:
        reference.given_moments = _moments(path, "mu", "sigma", extractor.dimension)
        reference.description["moments"] = f"those that {path.name} gives"
    if "mu_s" in arrays:
        reference.given_spatial_moments = _moments(path, "mu_s", "sigma_s", 2023)
    return reference


def _arrays(path):
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no whole .npz ({one_line(error)}); download it again") from None


def _finite(path, member, dimensions):
    """An array of floats from an .npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if (size := file.zip.getinfo(f"{member}.npy").file_size) > MOST_MEMBER_BYTES:
                raise ValueError(f"{member} has {size:,} bytes; at most {MOST_MEMBER_BYTES:,} are allowed")
            values = file[member]
    except Exception as error:  # numpy's, zipfile's and zlib's
        raise ValueError(f"{path}: {member} cannot be read ({one_line(error, 200)}); download it again") from None
    if values.ndim != dimensions or values.dtype.kind != "f" or 0 in values.shape:
        raise ValueError(
            f"{path}: {member} has shape {values.shape} and {values.dtype}; it must have {dimensions} axes of floats"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: {member} has values that are not finite; compute the statistics again")
    return values


def _check_dimension(path, member, dimension, expected):
    if expected is not None and dimension != expected:
        raise ValueError(
            f"{path}: {member} is of {dimension} features, the extractor gives {expected}; take its own statistics"
        )


def _moments(path, mean_name, covariance_name, dimension):
    mean = _finite(path, mean_name, 1).astype(np.float64)
    covariance = _finite(path, covariance_name, 2).astype(np.float64)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: {covariance_name} has shape {covariance.shape}, but {mean_name} has {len(mean)} values"
        )
    _check_dimension(path, mean_name, len(mean), dimension)
    return Moments(None, torch.from_numpy(mean), torch.from_numpy(covariance))
