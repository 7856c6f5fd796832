"""Mistyped paths: which ones are said not to exist, and the nearest one that does."""

from pathlib import Path

import pytest

from ddpm_hf.files.missing import can_be_on_the_hub, missing_path, nearest_path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for folder in ("my_folder", "runs/my_folder/pipeline", "runs/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("my_folderr", "my_folder"),
        ("./my_foler", "my_folder"),
        ("runs/my_foldr/pipeline", "runs/my_folder/pipeline"),  # not runs/other, which has no pipeline
        ("runs/my_folder/pipelin", "runs/my_folder/pipeline"),
        ("run/my_folder/pipeline", "runs/my_folder/pipeline"),
        ("runs/my_foldr/pipelin", None),  # two mistakes
        ("cifar10", None),
        ("/nothing/here", None),
        ("", None),
    ],
)
def test_the_nearest_path(name, close):
    assert nearest_path(Path(name)) == (close and Path(close))


def test_the_nearest_path_is_absolute_if_the_path_is(here):
    assert nearest_path(here / "my_foldr") == here / "my_folder"


def test_which_names_are_said_to_be_missing():
    assert missing_path("my_folder") is missing_path("google/ddpm-cifar10-32") is None
    assert missing_path("my_folderr") == "there is no folder or file 'my_folderr' here; did you mean 'my_folder'?"
    assert missing_path("imdb") == "there is no folder or file 'imdb' here"
    assert missing_path("runs/othr") == "there is no folder or file 'runs/othr' here; did you mean 'runs/other'?"
    assert can_be_on_the_hub("imdb") and can_be_on_the_hub("google/ddpm-cifar10-32")
    assert not any(map(can_be_on_the_hub, ("runs/a/pipeline", "./a", "../a", "~/a", "/a", "a/", "")))
