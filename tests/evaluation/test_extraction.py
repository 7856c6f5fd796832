"""Features of many images, by batches, threads and processes."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.features.extraction import extract
from ddpm_hf.evaluation.features.extractors import Extractor, open_extractor
from ddpm_hf.evaluation.image_sets import open_images
from ddpm_hf.evaluation.processes import Processes


def extractor_of(function, **kwargs):
    """An extractor of a function of RGB pixels."""
    device = torch.device("cpu")
    values = dict(name="own", distance="FD-own", size=None, resizing="none", digest="0" * 16, device=device)
    return Extractor(**{**values, **kwargs}, compute=lambda images: {"features": function(images)})


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (37, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(params=[np.savez, np.savez_compressed])
def images(request, tmp_path, pixels):
    request.param(tmp_path / "x.npz", arr_0=pixels)
    return open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_features_are_in_the_order_of_the_images(images, pixels, batch_size):
    features = extract(images, extractor_of(lambda x: x.float().flatten(1)), batch_size)["features"]
    assert features.dtype == torch.float32
    assert torch.equal(features, torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).float())


@dataclasses.dataclass(frozen=True)
class OneOfMany(Processes):
    """A process that does not wait for the others."""

    def gather(self, rows):
        return rows


@pytest.mark.parametrize("world_size", [2, 3, 37])
def test_each_process_computes_its_share(images, pixels, world_size):
    extractor = extractor_of(lambda x: x.float().flatten(1))
    shares = [extract(images, extractor, 4, OneOfMany(rank, world_size))["features"] for rank in range(world_size)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert torch.equal(torch.cat(shares), extract(images, extractor)["features"])


def test_efficientnet_features_do_not_depend_on_the_batch(images):
    extractor = open_extractor("efficientnet-lite0")
    few, many = (extract(images, extractor, batch_size) for batch_size in (5, 16))
    assert few["features"].shape == (37, 1280) and few["logits"].shape == (37, 1000)
    for name in few:
        torch.testing.assert_close(few[name], many[name], rtol=1e-4, atol=1e-4)


def test_features_that_are_not_finite_name_the_first_image(images):
    def features(x):
        values = x.float().flatten(1)
        values[x[:, 0, 0, 0] > 100] = torch.nan
        return values

    first = next(row for row in range(37) if images.read(range(row, row + 1))[0, 0, 0, 0] > 100)
    with pytest.raises(ValueError, match=f"features of image {first} of .*x.npz by own are not finite"):
        extract(images, extractor_of(features), 4)


def test_wrong_numbers_are_refused(images):
    extractor = extractor_of(lambda x: x.float().flatten(1))
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        extract(images, extractor, 0)
    with pytest.raises(ValueError, match="37 images are too few for 38 processes"):
        extract(images, extractor, processes=OneOfMany(0, 38))


def test_there_is_no_bar_in_logs(images):
    with contextlib.redirect_stderr(io.StringIO()) as output:
        extract(images, extractor_of(lambda x: x.float().flatten(1)))
    assert output.getvalue() == ""
