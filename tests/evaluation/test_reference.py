"""Features of real images, stored and found again, and the statistics files of other projects."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors
import torch

from ddpm_hf.data.sources import load_images
from ddpm_hf.evaluation.features import reference as module
from ddpm_hf.evaluation.features.extractors import Extractor
from ddpm_hf.evaluation.features.reference import read_reference, reference_of
from ddpm_hf.evaluation.image_sets import DataImages, open_images
from ddpm_hf.evaluation.metrics.frechet import Moments, frechet_distance


class Counting:
    """An extractor of a few pixels, "inception" by name, that counts the images that it has seen."""

    def __init__(self, name="inception", dimension=6, digest="0" * 16, spatial=True):
        self.seen = 0

        def compute(images):
            self.seen += len(images)
            flat = images.float().flatten(1)
            outputs = {"features": flat[:, :dimension], "logits": flat[:, :3]}
            return outputs | ({"spatial": flat[:, :4].repeat(1, 506)[:, :2023]} if spatial else {})

        values = dict(name=name, distance="FID", size=None, resizing="none", digest=digest, device=torch.device("cpu"))
        self.extractor = Extractor(**values, compute=compute, dimension=dimension)


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (30, 5, 4, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path, pixels):
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    return open_images(tmp_path / "real.npz")


def test_features_are_computed_once(tmp_path, images, counting):
    first = reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    again = reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    assert counting.seen == 30 and torch.equal(first.features, again.features)
    assert torch.equal(first.spatial, again.spatial)
    assert (again.count, again.size, again.description) == (30, (5, 4), first.description)
    assert again.description["digest"] == "0" * 16 and again.description["images"] == "real.npz"
    (path,) = (tmp_path / "store").iterdir()
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["facts"]) == first.description and set(file.keys()) == {"features", "spatial"}
    assert first.moments.count == 30 and first.spatial_moments.mean.shape == (2023,)
    np.testing.assert_allclose(first.moments.covariance, np.cov(first.features.double().numpy().T), rtol=1e-12)


def test_they_are_stored_in_the_cache_of_assets(tmp_path, monkeypatch, images, counting):
    monkeypatch.setattr(module, "cached_assets_path", lambda **names: tmp_path / "/".join(names.values()))
    reference_of(images, counting.extractor, progress=False)
    assert len(list((tmp_path / "ddpm-hf/features/inception").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_damaged_file_is_computed_again(tmp_path, images, counting, size):
    first = reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    (path,) = (tmp_path / "store").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    again = reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    assert counting.seen == 60 and torch.equal(first.features, again.features)
    assert path.read_bytes() == whole


def test_other_facts_are_computed_anew(tmp_path, images, counting, pixels, make_pipeline):
    def seen(images, counting):
        before = counting.seen
        reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
        return counting.seen - before

    assert seen(images, counting) == 30
    assert seen(images, Counting(digest="1" * 16)) == 30
    assert seen(images, Counting(name="other")) == 30
    np.savez(tmp_path / "real.npz", arr_0=pixels[:20])
    assert seen(open_images(tmp_path / "real.npz"), counting) == 20
    unet = make_pipeline().unet
    real = [
        DataImages(load_images("digits", split), unet, 17, 9, data="digits", split=split) for split in ("train", "test")
    ]
    assert [seen(entry, counting) for entry in (*real, *real)] == [9, 9, 0, 0]
    unet.preprocessing = {"crop": "none", "background": "white"}
    assert seen(DataImages(load_images("digits", "test"), unet, 17, 9, data="digits", split="test"), counting) == 9


def test_a_full_disk_costs_only_the_store(tmp_path, images, counting, capsys):
    (tmp_path / "store").write_text("a file")
    reference = reference_of(images, counting.extractor, folder=tmp_path / "store/below", progress=False)
    assert len(reference.features) == 30
    assert "are not stored" in capsys.readouterr().err


def test_all_processes_compute_if_one_has_not_found_them(tmp_path, images, counting):
    @dataclasses.dataclass(frozen=True)
    class OneOfTwo(module.Processes):
        """Another process, whose folder is on another machine, has not found the features."""

        def gather(self, rows):
            return torch.cat([rows, torch.zeros_like(rows)])

    reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    reference = reference_of(images, counting.extractor, 64, OneOfTwo(0, 2), folder=tmp_path / "store", progress=False)
    assert counting.seen == 45 and len(reference.features) == 30


def statistics(features):
    return features.mean(0), np.cov(features.T)


def test_moments_of_pytorch_fid_allow_the_frechet_distance(tmp_path, counting):
    features = np.random.default_rng(0).normal(size=(50, 6))
    mu, sigma = statistics(features)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    reference = read_reference(tmp_path / "stats.npz", counting.extractor)
    assert (reference.features, reference.spatial, reference.count, reference.spatial_moments) == (None,) * 4
    generated = torch.randn(40, 6)
    expected = frechet_distance(torch.from_numpy(features), generated)
    assert frechet_distance(reference.moments, Moments.of(generated)) == pytest.approx(expected, rel=1e-9)


def test_images_and_moments_of_adm(tmp_path, counting, pixels, monkeypatch):
    monkeypatch.setattr(module, "cached_assets_path", lambda **names: tmp_path / "assets")
    mu, sigma = statistics(np.random.default_rng(0).normal(size=(50, 6)))
    mu_s, sigma_s = np.ones(2023), np.eye(2023)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=pixels, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = read_reference(path, counting.extractor, progress=False)
    assert reference.count == len(reference.features) == 30 and reference.size == (5, 4)
    assert torch.equal(reference.moments.mean, torch.from_numpy(mu)) and reference.moments.count is None
    assert torch.equal(reference.spatial_moments.mean, torch.from_numpy(mu_s))
    other = read_reference(path, Counting("efficientnet-lite0").extractor, progress=False)
    assert other.moments.count == 30 and torch.equal(other.moments.mean, Moments.of(other.features).mean)
    np.savez(path, arr_0=pixels)
    assert read_reference(path, counting.extractor, progress=False).moments.count == 30


def test_features_of_score_sde(tmp_path, counting):
    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    np.savez_compressed(tmp_path / "cifar10_stats.npz", pool_3=features)
    reference = read_reference(tmp_path / "cifar10_stats.npz", counting.extractor)
    assert torch.equal(reference.features, torch.from_numpy(features))
    assert reference.count == reference.moments.count == reference.description["count"] == 50


def test_generated_images_of_another_size_are_refused(tmp_path, images, counting):
    reference = reference_of(images, counting.extractor, folder=tmp_path / "store", progress=False)
    reference.check(images)
    np.savez(tmp_path / "generated.npz", arr_0=np.zeros((2, 8, 9, 3), dtype=np.uint8))
    with pytest.raises(
        ValueError, match="generated.npz has images of 9x8, the reference real.npz of 4x5; take a reference"
    ):
        reference.check(open_images(tmp_path / "generated.npz"))


MU, SIGMA = np.zeros(6), np.eye(6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(x=MU), "has x; a reference has mu and sigma, pool_3, or arr_0"),
        (dict(mu=MU), "sigma cannot be read"),
        (dict(mu=MU, sigma=np.eye(5)), r"sigma has shape \(5, 5\), but mu has 6 values"),
        (dict(mu=np.zeros(7), sigma=np.eye(7)), "mu is of 7 features, the extractor gives 6; take its own statistics"),
        (dict(mu=MU * np.nan, sigma=SIGMA), "mu has values that are not finite"),
        (dict(mu=SIGMA, sigma=SIGMA), r"mu has shape \(6, 6\) and float64; it must have 1 axes of floats"),
        (dict(mu=np.array([{}] * 6), sigma=SIGMA), "mu cannot be read .*allow_pickle"),
        (dict(pool_3=np.zeros((9, 7))), "pool_3 is of 7 features"),
        (dict(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA), "mu_s is of 6 features, the extractor gives 2023"),
    ],
)
def test_bad_statistics_are_named_in_one_line(tmp_path, counting, arrays, message):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'stats.npz'))}.*{message}") as caught:
        read_reference(tmp_path / "stats.npz", counting.extractor)
    assert "\n" not in str(caught.value)


def test_other_files_and_extractors_are_refused(tmp_path, counting):
    with pytest.raises(ValueError, match="no.npz is not there"):
        read_reference(tmp_path / "no.npz", counting.extractor)
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="x.npz is no whole .npz"):
        read_reference(tmp_path / "x.npz", counting.extractor)
    np.savez(tmp_path / "x.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(ValueError, match="statistics of Inception features, but the extractor is dinov2"):
        read_reference(tmp_path / "x.npz", Counting("dinov2").extractor)
