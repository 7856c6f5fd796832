"""Pushing while a run goes on: it waits for no Hub and ends for none."""

import dataclasses
import sys
import time

import pytest

from ddpm_hf import DDPMImagePipeline
from ddpm_hf.hub.errors import HubError
from ddpm_hf.training.config import ConfigError, TrainConfig
from ddpm_hf.training.publisher import Publisher
from support.scripts import script

RUN = (
    "--steps 6 --batch_size 16 --sample_every 0 --sample_steps 3 --log_every 1 --lr_warmup_steps 0 --checkpoint_every 2 "
    "--lr_schedule constant --unet.block_out_channels [8,16] --unet.norm_num_groups 4 --unet.attention_head_dim 8"
)


@pytest.fixture
def publisher(hub, make_pipeline, tmp_path, request):
    hub.faults[:] = []
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    repo = "user/" + request.node.name.replace("_", "-")
    yield Publisher(TrainConfig(output_dir=str(tmp_path), push_to_hub=repo))
    hub.faults[:] = []


def commits(hub, repo):
    return [request for request in hub.requests if request[:2] == ("POST", f"/api/models/{repo}/commit/main")]


def save(make_pipeline, folder, scale):
    """As train.py replaces a pipeline: under another name first."""
    pipeline = make_pipeline()
    pipeline.unet.conv_in.bias.data.fill_(scale)
    pipeline.save_pretrained(folder.with_name(".new"))
    folder.rename(folder.with_name(f"old-{scale}"))
    folder.with_name(".new").rename(folder)


def test_nothing_waits_and_the_newest_goes(hub, publisher, make_pipeline, tmp_path):
    repo = publisher.config.push_to_hub
    hub.faults[:] = [dict(match=f"POST .*{repo}/commit/main", do=2.0)]
    start = time.perf_counter()
    for step in (1, 2, 3):
        save(make_pipeline, tmp_path / "pipeline", step)
        publisher.push(step)
        if step == 1:
            while not commits(hub, repo):
                time.sleep(0.01)
    assert publisher.thread.is_alive() and time.perf_counter() - start < 2
    publisher.thread.join()
    assert len(commits(hub, repo)) == 2  # the second gave way to the third
    assert DDPMImagePipeline.from_pretrained(repo, cache_dir=tmp_path / "cache").unet.conv_in.bias[0] == 3
    save(make_pipeline, tmp_path / "pipeline", 4)
    assert publisher.finish().startswith(f"{hub.url}/{repo}/commit/")
    assert DDPMImagePipeline.from_pretrained(repo, cache_dir=tmp_path / "again").unet.conv_in.bias[0] == 4
    assert not publisher.copies.exists()


def test_a_hub_that_fails_is_reported_once(hub, publisher, capsys):
    hub.faults[:] = [dict(match="POST .*/commit/main", do=500, times=3)]
    for step in (1, 2):
        publisher.push(step)
        if publisher.thread:
            publisher.thread.join()
    output = capsys.readouterr().err
    assert output.count("the Hub answered 500") == 1 and "the run continues, the next checkpoint is pushed" in output
    with pytest.raises(
        HubError, match="the Hub answered 500.*to try again: python training/push.py .*pipeline --repo_id"
    ):
        publisher.finish()
    hub.faults[:] = []
    publisher.push(3)
    publisher.thread and publisher.thread.join()
    assert publisher.reported is None and hub.files(publisher.config.push_to_hub)
    for number in (1, 2):
        publisher._warn(HubError(f"the Hub answered 429 (Request ID: Root={number}) and no more"))
    output = capsys.readouterr().err
    assert output.count("the Hub answered 429") == 1


def test_what_the_hub_refuses_is_reported_before_anything_starts(hub, tmp_path, capsys):
    hub.faults[:] = []
    hub.create("other/there")  # which the Hub answers as if it were one's own
    hub.commit(hub.create("user/data"), "main", {"a.csv": hub.entry("a.csv", b"1")}, "data")
    for repo, message in (
        ("other/name", "may not write there"),
        ("other/there", "may not write there"),
        ("user/data", "holds something that is no pipeline"),
        ("a b", "is no name of a repository"),
    ):
        with pytest.raises(ConfigError, match=f"push_to_hub='{repo}': .*{message}"):
            Publisher(TrainConfig(output_dir=str(tmp_path), push_to_hub=repo))
    hub.faults[:] = [dict(match="POST .*/repos/create", do=503)]
    Publisher(TrainConfig(output_dir=str(tmp_path), push_to_hub="user/unreached"))
    assert "the Hub answered 503" in capsys.readouterr().err
    hub.faults[:] = []


def test_no_repository_is_made_for_data_that_is_not_there(hub, tmp_path):
    arguments = [*RUN.split(), "--split", "none", "--push_to_hub", "user/not-made", "--output_dir", tmp_path / "run"]
    assert "split='none'" in script("train.py", *arguments, check=False).stderr
    assert ("model", "user/not-made") not in hub.repositories


def test_a_run_pushes_at_its_checkpoints(hub, tmp_path):
    """The first push fails, the next one has it; what a killed run left goes."""
    hub.faults[:] = [dict(match="POST .*/while-it-runs/commit/main", do=500, times=1)]
    (tmp_path / ".to-push/0000001").mkdir(parents=True)
    result = script("train.py", *RUN.split(), "--push_to_hub", "user/while-it-runs", "--output_dir", tmp_path)
    hub.faults[:] = []
    assert "published" in result.stdout and len(commits(hub, "user/while-it-runs")) >= 2
    assert "the run continues" in result.stderr or result.stderr == ""
    assert b'"steps": 6' in hub.files("user/while-it-runs")["training.json"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_unreachable_hub_ends_no_run(tmp_path):
    """Nor does it hold one up: the port is closed."""
    result = script(
        "train.py", *RUN.split(), "--push_to_hub", "user/x", "--output_dir", tmp_path,
        launcher=[sys.executable], HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "saved" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert "http://127.0.0.1:9 was not reached" in last and "to try again: python training/push.py" in last
    assert (tmp_path / "pipeline/model_index.json").is_file()


def test_the_command_that_publishes_is_of_the_program_that_trained(publisher):
    config, folder = dataclasses.replace(publisher.config, license="mit"), publisher.folder
    for program, command in (("train.py", "python training/push.py"), ("ddpm-hf train", "ddpm-hf push")):
        publisher.config = dataclasses.replace(config, program=program)
        expected = (
            f"; to publish what is saved by then: {command} {folder} --repo_id {config.push_to_hub} --license mit"
        )
        assert publisher.how_to_publish() == expected
