"""Subclasses of the schedulers work wherever their parents do."""

import pytest
import torch
from diffusers import DDPMScheduler, ScoreSdeVeScheduler

from ddpm_hf.schedulers import SCHEDULERS, VariationalDDPMScheduler
from ddpm_hf.schedulers.ddpm import VARIANCE_TYPES

SETTINGS = {"VariationalDDPMScheduler": {"levels": 16, "beta_schedule": "cosine"}, "VESDEScheduler": {"sigma_max": 9.0}}


def steps(scheduler):
    """The results of three steps from the same sample with the same noise."""
    scheduler.set_timesteps(10)
    sample, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return [scheduler.step(output, t, sample, variance_noise=noise).prev_sample for t in scheduler.timesteps[:3]]


def same(scheduler, expected):
    return all(torch.equal(a, b) for a, b in zip(steps(scheduler), steps(expected), strict=True))


@pytest.mark.parametrize("parent", SCHEDULERS, ids=lambda parent: parent.__name__)
def test_a_bare_subclass_is_as_good_as_its_parent(parent, tmp_path):
    subclass = type("Mine", (parent,), {})
    expected = parent(num_train_timesteps=200, **SETTINGS.get(parent.__name__, {}))
    subclass.from_config(expected.config).save_pretrained(tmp_path)
    opened = {cls: cls.from_pretrained(tmp_path) for cls in (subclass, parent)}
    for cls, scheduler in opened.items():
        assert type(scheduler) is cls and same(scheduler, expected)
    assert same(parent.from_config(opened[subclass].config), expected)
    assert subclass.stock_class == parent.stock_class and subclass.source_name == parent.source_name


@pytest.mark.parametrize("parent", SCHEDULERS[:3], ids=lambda parent: parent.__name__)
@pytest.mark.parametrize("config", [{}, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "cosine"])
def test_a_subclass_opens_the_configs_of_diffusers(parent, config):
    stock = DDPMScheduler(num_train_timesteps=50, **config).config
    subclass = type("Mine", (parent,), {})
    if config and parent is SCHEDULERS[2]:
        with pytest.raises(ValueError, match="^Mine has no process for beta_schedule="):
            subclass.from_config(stock)
    else:
        assert same(subclass.from_config(stock), parent.from_config(stock))


def test_how_the_schedulers_are_saved():
    """Each stock class is opened by one of ours; what no stock class samples rightly brings its source."""
    stock = [name for cls in SCHEDULERS for name in cls.stands_for]
    assert sorted(stock) == ["DDPMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"]
    for cls in SCHEDULERS:
        scheduler = cls()
        assert scheduler.is_stock == (cls.stock_class is not None) == (scheduler.own_source is None)
    own = VariationalDDPMScheduler(rescale_timesteps=True)
    assert not own.is_stock and own.own_source == "ddpm_scheduler"


def test_subclasses_of_diffusers_keep_their_methods():
    """They are not replaced, whatever they are called."""
    for stock in (DDPMScheduler, ScoreSdeVeScheduler):
        (replacing,) = [cls for cls in SCHEDULERS if cls.replaces(stock())]
        assert not replacing.replaces(replacing())
        assert not any(cls.replaces(type(stock.__name__, (stock,), {})()) for cls in SCHEDULERS)


def test_what_the_schedulers_say_of_themselves():
    for variance_type in VARIANCE_TYPES:
        options = {"x_start_mse": [0.3] * 1000} if variance_type == "analytic" else {}
        scheduler = VariationalDDPMScheduler(variance_type=variance_type, **options)
        assert scheduler.learns_variance == (variance_type in ("learned", "learned_range"))
        assert not scheduler.is_continuous
    for cls in SCHEDULERS[1:]:
        assert cls().is_continuous and not cls().learns_variance and cls().sde is not None
