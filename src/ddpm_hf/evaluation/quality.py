"""The quality of generated images: FID and its kin, by name, from the features of real and generated images."""

import dataclasses
import math
from typing import Any

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.command_help import did_you_mean
from ddpm_hf.errors import UserError
from ddpm_hf.evaluation.features.extractors import Extractor
from ddpm_hf.evaluation.features.reference import Reference
from ddpm_hf.evaluation.metrics.estimate import Estimate
from ddpm_hf.evaluation.metrics.features import float64_device
from ddpm_hf.evaluation.metrics.frechet import Moments, frechet_at_infinity, frechet_distance, frechet_error
from ddpm_hf.evaluation.metrics.inception_score import inception_score
from ddpm_hf.evaluation.metrics.kernel import kernel_distance
from ddpm_hf.evaluation.metrics.manifold import ManifoldComparison, compare_manifolds
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.hub.markdown import with_error

# kind of metric -> what it is
KINDS = {
    "fd": "Fréchet distance",
    "sfd": "Fréchet distance of spatial features",
    "is": "Inception score",
    "kd": "kernel distance",
    "prc": "precision and recall",
    "dc": "density and coverage",
}
# names of the field -> kind and extractor
NAMES = {
    "fid": ("fd", "inception"),
    "sfid": ("sfd", "inception"),
    "is": ("is", "inception"),
    "kid": ("kd", "inception"),
}
# what the numbers of `table` mean
LEGEND = (
    "(+- is the standard error over new samples; of recall and coverage, over new real images; of kernel distances, over both.",
    " Distances are better the smaller, all other numbers the larger.)",
)
FEWEST = {"kd": 4, "prc": 6, "dc": 6}  # images; 2 for the others
WITH_ANY_EXTRACTOR = ("fd", "kd", "prc", "dc")


def parse_metrics(text: str, extractor: str = "inception") -> dict[str, list[str]]:
    """Read a list of metrics, such as "fid,sfid,is,kid,prc,fd-dinov2".

    Args:
        text: fid, sfid, is and kid are of Inception features. fd, kd, prc and dc are of `extractor`, or of the one after a
            hyphen: fd-dinov2.
        extractor: see `open_extractor`.

    Returns:
        extractor -> kinds of metrics (`KINDS`), each once, in order.

    Raises:
        UserError: an unknown or an empty name.
    """
    by_extractor: dict[str, list[str]] = {}
    for name in (part.strip() for part in text.split(",")):
        kind, _, own = name.partition("-")
        if name.lower() in NAMES:
            kind, own = NAMES[name.lower()]
        elif kind.lower() not in WITH_ANY_EXTRACTOR:
            known = [*NAMES, *WITH_ANY_EXTRACTOR]
            hint = did_you_mean(name.lower(), known) or f"; known are {', '.join(known)} and fd-EXTRACTOR"
            raise UserError(f"metrics={shown(text)}: {name[:40]!r} is unknown{hint}")
        kinds = by_extractor.setdefault(own or extractor, [])
        if kind.lower() not in kinds:
            kinds.append(kind.lower())
    return by_extractor


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number with what it is of.

    Attributes:
        kind: the entry of `KINDS`.
        name: what papers call it: "FID", "FD-DINOv2", "precision".
        value, standard_error: of fresh sets of generated images (of real ones for recall and coverage); NaN where unknown.
        at_infinity: the value for infinitely many generated images, for Fréchet distances.
        real_images: number of real images; None if there are none, or the reference does not say it.
        generated_images: number of generated images.
        note: what to know about it, in one line.
    """

    kind: str
    name: str
    value: float
    standard_error: float
    real_images: int | None
    generated_images: int
    at_infinity: Estimate | None = None
    note: str | None = None


def measure(
    kinds: list[str],
    extractor: Extractor,
    real: Reference,
    generated: dict[str, torch.Tensor],
    processes: Processes | None = None,
    with_limit: bool = True,
) -> tuple[list[Measurement], ManifoldComparison | None]:
    """Compute metrics of one extractor.

    Args:
        kinds: of `KINDS`.
        extractor: that of all features.
        real: features or moments of real images.
        generated: what `extract` returns of generated images: "features" (N, D), and "spatial" or "logits" where they are.
        processes: those that share precision and recall; each gets the result. All other metrics are computed by each.
        with_limit: also compute errors of Fréchet distances and their limit, which take 47 distances more.

    Returns:
        The measurements, and the comparison that precision and recall come from; None without them.

    Raises:
        ValueError: features that a metric needs are not there, or too few images.
    """
    device = float64_device(extractor.device)
    features = generated["features"].to(device)
    real_features = None if real.features is None else real.features.to(device)
    counts: dict[str, Any] = dict(real_images=real.count, generated_images=len(features))
    check_needs(kinds, extractor, real, len(features), generated)
    rows: list[Measurement] = []
    comparison = None
    if "prc" in kinds or "dc" in kinds:
        assert real_features is not None
        comparison = compare_manifolds(real_features, features, processes=processes)
    for kind in kinds:
        if kind in ("fd", "sfd"):
            moments = real.moments if kind == "fd" else real.spatial_moments
            parts = features if kind == "fd" else generated["spatial"].to(device)
            assert moments is not None
            name = extractor.distance if kind == "fd" else f"s{extractor.distance}"
            rows.append(_frechet(kind, name, moments, parts, counts, with_limit))
        elif kind == "kd":
            assert real_features is not None
            distance = kernel_distance(real_features, features, generator=_generator())
            name = {"FID": "KID"}.get(extractor.distance, extractor.distance.replace("FD-", "KD-", 1))
            rows.append(Measurement(kind, name, *distance.estimate, **counts, note=distance.note))
        elif kind == "is":
            estimate = inception_score(generated["logits"].to(device))
            rows.append(Measurement(kind, "Inception score", *estimate, **{**counts, "real_images": None}))
        else:
            assert comparison is not None
            for name in KINDS[kind].split(" and "):
                rows.append(Measurement(kind, name, *getattr(comparison, name), **counts))
    return rows, comparison


def check_needs(
    kinds: list[str], extractor: Extractor, real: Reference, count: int, generated: dict | None = None
) -> None:
    """Raise ValueError if the reference or the extractor does not have what a metric needs, or there are too few images.

    Args:
        count: number of generated images.
    """
    for kind in kinds:
        fewest = FEWEST.get(kind, 2)
        for name, number in (("generated", count), ("real", real.count)):
            if number is not None and number < fewest:
                raise ValueError(f"{KINDS[kind]} need {fewest} {name} images or more, not {number}")
        if kind in ("kd", "prc", "dc") and real.features is None:
            raise ValueError(
                f"{KINDS[kind]} need features of real images, and {real.description['images']} holds moments alone; give --data"
            )
        if kind == "sfd" and real.spatial_moments is None:
            raise ValueError(f"{real.description['images']} has no mu_s and sigma_s, which sFID needs; give --data")
        if generated is not None and {"sfd": "spatial", "is": "logits"}.get(kind, "features") not in generated:
            raise ValueError(f"{KINDS[kind]}: {extractor.name} gives no such features; use the inception extractor")


def _frechet(kind, name, real: Moments, features, counts, with_limit):
    real = real.to(features.device)
    value, error, limit = frechet_distance(real, features), math.nan, None
    own = Moments(len(features), real.mean, real.covariance)
    note = own.advice and f"of the samples: {own.advice}"
    if real.is_singular and note is None:
        note = f"of the real images: {real.advice}"
    if with_limit and len(features) >= 64:
        error = frechet_error(real, features, generator=_generator())
        limit = frechet_at_infinity(real, features, standard_error=error, generator=_generator())
    return Measurement(kind, name, value, error, **counts, at_infinity=limit, note=note)


def _generator():
    return torch.Generator().manual_seed(0)  # the numbers of one set of images are always the same


def table(rows: list[Measurement]) -> list[str]:
    """The measurements as lines of text; `LEGEND` explains them."""
    lines = []
    for row in rows:
        real = f", {row.real_images:,} real" if row.real_images else ""
        lines.append(
            f"  {row.name:22} {with_error(row.value, row.standard_error, '+-'):24} {row.generated_images:,} generated{real}"
        )
        if row.at_infinity is not None:
            lines.append(
                f"    extrapolated to      {with_error(*row.at_infinity, '+-'):24} infinitely many generated{real}"
            )
        if row.note:
            lines.append(f"    {row.note}")
    return lines
