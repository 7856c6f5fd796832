"""A folder as a stranger may hand it over: what is in it is read within bounds, and nothing outside of it."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMUNet,
    NoisyClassifier,
    VariationalDDPMScheduler,
    VPSDEScheduler,
)
from ddpm_hf.files.guarded import read_json
from ddpm_hf.hub.card import card_text, evaluation_command, write_model_card
from ddpm_hf.hub.contents import published_files
from ddpm_hf.hub.markdown import code
from ddpm_hf.hub.records import weights_digest
from support.networks import small_classifier

TRAINING = {
    "data": "digits", "split": "train", "steps": 7, "batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 0.1,
    "ema_decay": 0.5, "loss": "simple", "weighting": None, "seed": 0, "preset": "digits", "hub_dataset": "user/images",
    "label_names": ["a", "b", "c"], "versions": {"torch": "2.13.0+cpu"},
}  # fmt: skip
EVALUATION = {
    "data": "digits", "split": "test", "total": 3.0, "prior": 0.0, "kl": 2.5, "decoder": 0.5, "images": 4, "steps": 1000,
    "first_timestep": 0, "seed": 0, "standard_error": None, "sampling_error": None, "evaluations_per_image": 1000,
    "command": "python training/evaluate.py pipeline --data digits",
}  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(make_pipeline, tmp_path):
    """A pipeline with everything that it can have, and its weights in several files."""
    pipeline = make_pipeline(num_class_embeds=3)
    pipeline.unet.class_names = ["a", "b", "c"]
    classifier = small_classifier(num_classes=3)
    DDPMImagePipeline(pipeline.unet, pipeline.scheduler, classifier).save_pretrained(
        tmp_path / "saved", max_shard_size="40KB"
    )
    (tmp_path / "saved/training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "saved/evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path / "saved"


USES = {"open": DDPMImagePipeline.from_pretrained, "push": published_files, "card": card_text}


def refusals(folder, uses=("open", "push", "card")):
    """Use -> the message of its error, which is one line that names something in the folder; "" where there is none."""
    messages = {}
    for name in uses:
        try:
            USES[name](folder)
            messages[name] = ""
        except (ValueError, OSError) as error:
            messages[name] = str(error)
            assert "\n" not in messages[name] and str(folder) in messages[name] and len(messages[name]) < 900, (
                name,
                error,
            )
    return messages


READ_BY = {  # file -> uses that read it
    "model_index.json": {"open", "push", "card"}, "unet/config.json": {"open", "push", "card"},
    "scheduler/scheduler_config.json": {"open", "push", "card"}, "classifier/config.json": {"open", "push", "card"},
    "training.json": {"push", "card"}, "evaluation.json": {"push", "card"}, f"{WEIGHTS}.index.json": {"open", "push"},
}  # fmt: skip
BROKEN = (
    b"", b"{", b"[]", b"null", b"3", '{"a": "é"}'.encode("latin-1"), b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}',
    b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}",
    b'{"a": ' + b"7" * 10**6 + b"}", b'{"a": "\\ud800"}',
)  # fmt: skip


@pytest.mark.parametrize("file", READ_BY)
def test_files_that_hold_no_json_of_a_pipeline(saved, file):
    for content in BROKEN:
        (saved / file).write_bytes(content)
        messages = refusals(saved, READ_BY[file])
        assert all(file in message for message in messages.values()), (content[:20], messages)
    os.truncate(saved / file, 10**11)  # sparse; nothing of it is read
    messages = refusals(saved, READ_BY[file])
    assert all("has 100,000,000,000 bytes; at most 4,194,304" in message for message in messages.values())
    for make in (os.mkdir, os.mkfifo):
        os.remove(saved / file)
        make(saved / file)
        assert all(refusals(saved, READ_BY[file] - {"open" if "index" in file else ""}).values())
        make is os.mkdir and os.rmdir(saved / file)
        (saved / file).touch()


VALUES = (
    None,
    "",
    [],
    {},
    -1,
    0.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    True,
    "x",
    ["x"],
    {"x": 1},
    [[]],
    [None, 3],
)


def mutated(values, others=VALUES):
    """Each key left out, and with other values."""
    for key in values:
        yield {name: value for name, value in values.items() if name != key}
        yield from ({**values, key: value} for value in others)


@pytest.mark.slow
@pytest.mark.parametrize("file", READ_BY)
def test_no_value_ends_in_a_traceback(saved, file):
    values = json.loads((saved / file).read_text())
    for others in mutated(values):
        (saved / file).write_text(json.dumps(others))
        refusals(saved)


def test_few_values_end_in_no_traceback(saved):
    for file in READ_BY:
        values = json.loads((saved / file).read_text())
        for others in list(mutated(values, ([], 10**30)))[:: 9 if len(values) < 12 else 23]:
            (saved / file).write_text(json.dumps(others))
            refusals(saved, READ_BY[file])
        (saved / file).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"../../victim": ["diffusers", "UNet2DModel"]}, "holds a DDPMPipeline of ../../victim"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "this class opens pipelines of unet, scheduler, classifier only"),
        ({"classifier": ["../noisy_classifier", "NoisyClassifier"]}, "its classifier is .* not .library, class."),
        ({"unet": ["diffusers", "UNet2DModel", "x"]}, "its unet is"),
        ({"unet": [None, None]}, "this class opens pipelines of a UNet2DModel and a scheduler"),
        ({"unet": ["diffusers", "AutoencoderKL"]}, "this class opens pipelines of a UNet2DModel and a scheduler"),
        ({"scheduler": ["os", "system"]}, "system, which is no scheduler of diffusers"),
        ({"scheduler": ["diffusers", "UNet2DModel"]}, "UNet2DModel, which is no scheduler of diffusers"),
        ({"classifier": ["diffusers", "UNet2DModel"]}, "only NoisyClassifier is known"),
        ({"_class_name": ["../pipeline", "DDPMImagePipeline"]}, "is not the name of a class"),
        ({"_class_name": []}, "is not the name of a class"),
        ({"_class_name": None}, "is not the name of a class"),
    ],
)
def test_an_index_names_nothing_else(saved, tmp_path, entries, message):
    (tmp_path / "victim").mkdir()
    shutil.copytree(saved / "unet", tmp_path / "victim/unet")
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps({**index, **entries}))
    assert re.search(message, refusals(saved)["open"])


def test_links_to_the_outside_are_neither_opened_nor_pushed(saved, tmp_path):
    whole, secret = tmp_path / "whole", tmp_path / "secret"
    shutil.copytree(saved, whole)
    for name in (
        "README.md",
        "LICENSE",
        "samples.png",
        "animation.webp",
        "evaluation.png",
        "evaluation.csv",
        "training.png",
    ):
        secret.write_bytes(b"private")
        shutil.copytree(whole, saved, dirs_exist_ok=True)
        (saved / name).symlink_to(secret)
        with pytest.raises(ValueError, match=f"saved/{name} is a link to outside of .*saved; put a copy of the file"):
            published_files(saved)
        (saved / name).unlink()
    inner = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.suffix != ".py"]
    for name in (*inner, "unet", "scheduler", "classifier", "pipeline.py"):
        shutil.rmtree(saved)
        shutil.copytree(whole, saved)
        shutil.rmtree(saved / name, ignore_errors=True)
        (saved / name).unlink(missing_ok=True)
        (saved / name).symlink_to(whole / name)
        opened = name not in ("pipeline.py", "training.json", "evaluation.json") and "-0" not in name
        messages = refusals(saved, ("push", "open") if opened else ("push",))
        assert all("is a link to outside" in message for message in messages.values()), name
    shutil.rmtree(saved)
    saved.symlink_to(whole)  # a whole pipeline by another name, and links within it
    (whole / "LICENSE").symlink_to(whole / "training.json")
    assert {"LICENSE", WEIGHTS + ".index.json"} <= published_files(saved).keys()
    assert refusals(saved) == {"open": "", "push": "", "card": ""}


def test_links_of_the_hubs_cache_are_opened_and_pushed(hub, saved, tmp_path):
    DDPMImagePipeline.from_pretrained(saved).push_to_hub("user/cached")
    pipeline = DDPMImagePipeline.from_pretrained("user/cached", cache_dir=tmp_path / "cache")
    snapshot = next(tmp_path.glob("cache/models--user--cached/snapshots/*"))
    assert (snapshot / "unet/config.json").is_symlink()
    assert torch.equal(pipeline.unet.conv_in.weight, DDPMImagePipeline.from_pretrained(snapshot).unet.conv_in.weight)
    assert "unet/config.json" in published_files(snapshot)
    DDPMUNet.from_pretrained(snapshot / "unet")
    DDPMUNet.from_pretrained("user/cached", subfolder="unet", cache_dir=tmp_path / "cache")
    VariationalDDPMScheduler.from_pretrained(snapshot, subfolder="scheduler")
    (snapshot / "LICENSE").symlink_to(tmp_path / "saved/training.json")
    with pytest.raises(ValueError, match="LICENSE is a link to outside"):
        published_files(snapshot)


PARTS = {
    "unet/config.json": DDPMUNet, "unet/*-00001-of-*": DDPMUNet,
    "classifier/config.json": NoisyClassifier, "scheduler/scheduler_config.json": VariationalDDPMScheduler,
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_by_themselves_follow_no_link(saved, tmp_path, name):
    """Into the pipeline's folder a link may lead, as for a pipeline."""
    path, cls = next(saved.glob(name)), PARTS[name]
    shutil.move(path, saved / "kept")
    path.symlink_to(saved / "kept")
    part = cls.from_pretrained(path.parent)
    path.unlink()
    shutil.move(saved / "kept", tmp_path / "victim")
    path.symlink_to(tmp_path / "victim")
    for location in (path.parent, {}), (saved, {"subfolder": path.parent.name}):
        with pytest.raises(ValueError, match=f"{re.escape(path.name)} is a link to outside"):
            cls.from_pretrained(location[0], **location[1])
    before = (tmp_path / "victim").read_bytes()
    for save in part.save_config, part.save_pretrained:
        with pytest.raises(ValueError, match=f"{re.escape(path.name)} is a link, and what it leads to"):
            save(path.parent)
    assert (tmp_path / "victim").read_bytes() == before


@pytest.mark.parametrize("cls", [VariationalDDPMScheduler, VPSDEScheduler])
def test_a_schedulers_config_that_is_no_json(cls, tmp_path):
    for text in "[" * 100_000, "{" * 3, '{"levels": ' + "9" * 5000 + "}":
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match="^[^\n]*scheduler_config.json is not JSON [^\n]*$"):
            cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "samples.png", "animation.gif", "pipeline.py"])
def test_what_is_too_large_or_no_file_is_not_pushed(saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(ValueError, match=f"{name} is a device or pipe, not a file"):
        published_files(saved)
    (saved / name).unlink()
    (saved / name).touch()
    os.truncate(saved / name, 10**10)
    with pytest.raises(ValueError, match=f"{name} has 10,000,000,000 bytes; at most"):
        published_files(saved)


def test_saving_writes_through_no_link(saved, make_pipeline, tmp_path):
    victim = tmp_path / "victim"
    for name in ("model_index.json", "pipeline.py", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS):
        victim.write_text("mine")
        (saved / name).unlink(missing_ok=True)
        (saved / name).symlink_to(victim)
        pipeline = make_pipeline()
        for save in (pipeline.save_pretrained, *([pipeline.save_config] if name == "model_index.json" else [])):
            with pytest.raises(ValueError, match=f"saved/{name} is a link, and what it leads to would be overwritten"):
                save(saved)
        assert victim.read_text() == "mine"
        (saved / name).unlink()
    (saved / "notes.json").symlink_to(victim)  # which nobody would write
    make_pipeline().save_pretrained(saved)
    assert victim.read_text() == "mine"
    shutil.rmtree(saved / "unet")
    (saved / "unet").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="saved/unet is a link"):
        make_pipeline().save_pretrained(saved)


def test_a_stage_of_a_cascade_lies_within_it(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "elsewhere")
    folder = tmp_path / "cascade"
    folder.mkdir()
    names = {
        stage: ["pipeline", kind] for stage, kind in (("base", "DDPMImagePipeline"), ("upsampler", "DDPMImagePipeline"))
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "CascadePipeline"], **names}))
    (folder / "base").symlink_to(tmp_path / "elsewhere")
    (folder / "upsampler").mkdir()
    with pytest.raises(ValueError, match="is no cascade: it has no folder base of its own"):
        CascadePipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "CascadePipeline", **names, "../x": ["a", "b"]})
    )
    with pytest.raises(
        ValueError, match="of ../x, base, upsampler; this class opens pipelines of base, upsampler only"
    ):
        CascadePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        ("training", "steps", "many", "training.json: steps='many' must be an integer, 0 or more; remove the file"),
        ("training", "data", None, "data=None must be text of 1 to 500 characters"),
        ("training", "data", "x" * 501, "must be text of 1 to 500"),
        ("training", "loss", "simple\n", "must be a word"),
        ("training", "hub_dataset", 3, "must be text of 1 to 500 characters or null"),
        ("training", "versions", {"torch": "2 [x](y)"}, "must be versions by name"),
        ("training", "learning_rate", float("nan"), "must be a finite number"),
        ("training", "seed", True, "seed=True must be an integer"),
        ("training", "label_names", ["a", 3], "must be a list of at most 100,000 texts"),
        ("evaluation", "total", float("inf"), "evaluation.json: total=inf must be a finite number; remove the file"),
        ("evaluation", "command", 3, "must be one line of at most"),
        ("evaluation", "images", -1, "must be an integer"),
    ],
)
def test_records_are_as_the_scripts_write_them(saved, file, key, value, message):
    path = saved / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    messages = refusals(saved)
    assert messages["open"] == "" and message in messages["push"] and message in messages["card"]


HOSTILE = (
    "a`b``c", "`", "``` \n```", "](https://x)<script>alert(1)</script>", "x | y",
    "---\nlicense: mit\n---", "a\r\n# b", "$(x); `y`",
    "{{ 7 * 7 }}{% for x in y %}", "\u202eabc", " x ", "'\"", "</details>", "&lt;", "\x1b[31m",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_is_only_text_in_the_card(saved, text):
    """The same lines, header, and code blocks as with plain text in its place."""
    (saved / "training.json").write_text(
        json.dumps({**TRAINING, **dict.fromkeys(("data", "split", "preset", "hub_dataset"), text), "notes": text})
    )
    command = shlex.join(["python", "training/evaluate.py", "pipeline", "--data", text])
    (saved / "evaluation.json").write_text(
        json.dumps({**EVALUATION, **dict.fromkeys(("data", "split"), text), "command": command})
    )
    config = json.loads((saved / "unet/config.json").read_text())
    config["_ddpm_hf"]["class_names"] = [text, "b", "c"]
    (saved / "unet/config.json").write_text(json.dumps(config))
    lines = write_model_card(saved).read_text().split("\n")
    plain = {
        "training": TRAINING | dict.fromkeys(("split", "preset"), "digits") | {"notes": "digits"},
        "evaluation": EVALUATION,
    }
    for name, values in plain.items():
        (saved / f"{name}.json").write_text(json.dumps({**values, "split": "digits"}))
    config["_ddpm_hf"]["class_names"] = ["digits", "b", "c"]
    (saved / "unet/config.json").write_text(json.dumps(config))
    expected = card_text(saved).split("\n")
    end = lines.index("---", 1)
    header, body = yaml.safe_load("\n".join(lines[1:end])), lines[end:-2]
    assert "datasets" not in header
    assert header["model-index"][0]["results"][0]["dataset"]["split"].isprintable() and "license" not in header
    others = [line for line in body if line not in expected]
    if text.isprintable():
        assert len(body) == len(expected[expected.index("---", 1) : -2])
        shown = code(text)
        for line in others:  # where it stands it is a code span, or a string of JSON
            line = line.replace(shown.replace("|", "\\|"), "").replace(shown, "").replace(code(command), "")
            assert text in ("`", " x ") or text not in line or json.loads("{" + line.strip().rstrip(",") + "}"), line
    assert all(line.isprintable() for line in lines)


def test_code_spans():
    """CommonMark 6.1: a span ends at a run of as many backticks as it begins with; one space at both ends is taken off."""
    for text in HOSTILE:
        span = code(text)
        fence = re.match("`+", span)[0]
        runs = re.findall("`+", span)
        assert runs.count(fence) == 2 and span.endswith(fence) and span.isprintable()
        inner = span[len(fence) : -len(fence)]
        inner = inner[1:-1] if inner[0] == inner[-1] == " " and inner.strip() else inner
        assert inner.encode().decode("unicode_escape").encode("latin-1", "replace") in (
            text.encode("latin-1", "replace"),
            text.encode().decode("unicode_escape").encode("latin-1", "replace"),
        )


def test_commands_are_calls_of_the_script_alone():
    plain = "python training/evaluate.py pipeline --data digits --images 4"
    assert evaluation_command(plain) == plain == evaluation_command(plain + " ")
    assert (
        evaluation_command("python training/evaluate.py pipeline --data 'a b' --ode")
        == plain.partition("digits")[0] + "'a b' --ode"
    )
    quoted = evaluation_command("python training/evaluate.py pipeline --data $(touch x) ; rm y")
    assert (
        shlex.split(quoted)[3:] == ["--data", "$(touch", "x)", ";", "rm", "y"]
        and "'$(touch'" in quoted
        and "';'" in quoted
    )
    others = (None, "", "rm -r /", "python evaluate.py x", "python training/evaluate.py", "python 'training")
    assert evaluation_command(f"{plain} --levels=$(x)").endswith(" '--levels=$(x)'")
    for other in (*others, f"{plain}\nrm x", f"{plain} --$(x) y"):
        assert evaluation_command(other) is None


def test_the_card_names_a_subset(saved):
    (saved / "evaluation.json").write_text(json.dumps({**EVALUATION, "subset": {"of": 100, "seed": 0, "rows": "x"}}))
    assert "Over 4 images, a fixed random subset of the 100 of split `test` of `digits`" in card_text(saved)


@pytest.mark.parametrize(
    ("evaluations", "way"),
    [
        (16, "an unbiased estimate of the variational bound from 16 network\nevaluations per image"),
        (1000, "the variational bound with all 1000 terms"),
    ],
)
def test_what_the_training_measured_is_in_the_card(saved, evaluations, way):
    """Until it is measured by evaluate.py; a number of other weights is not told."""
    held_out = {"step": 7, "images": 64, "total": 7.0541, "standard_error": 0.1142}
    record = TRAINING | {"eval_evaluations": evaluations, "held_out_bits_per_dim": held_out}
    (saved / "training.json").write_text(json.dumps(record | {"weights": weights_digest(saved)}))
    (saved / "evaluation.json").unlink()
    card = card_text(saved)
    start = "7.054 ± 0.114 (standard error) bits/dim over 64 held-out images, measured during training after step 7: "
    assert f"{start}{way}. `ddpm-hf evaluate` measures" in card and "Not measured" not in card
    (saved / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert "7.054 ±" not in card_text(saved) and "| total | 3.0000 |" in card_text(saved)
    (saved / "evaluation.json").unlink()
    (saved / "training.json").write_text(json.dumps(record | {"weights": "other"}))
    assert "Not measured" in card_text(saved) and "7.054 ±" not in card_text(saved)
    for wrong in ({"step": 7}, held_out | {"total": "x"}, held_out | {"images": "<b>"}, [7]):
        (saved / "training.json").write_text(json.dumps(record | {"held_out_bits_per_dim": wrong}))
        with pytest.raises(ValueError, match="held_out_bits_per_dim=.* must be"):
            card_text(saved)


def test_the_task_of_an_evaluation(saved, make_pipeline, tmp_path):
    (saved / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert ModelCard(card_text(saved)).data.eval_results[0].task_type == "image-generation"  # of a class
    make_pipeline().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain/evaluation.json").write_text(json.dumps(EVALUATION))
    assert ModelCard(card_text(tmp_path / "plain")).data.eval_results[0].task_type == "unconditional-image-generation"


def test_class_names_are_in_the_card(saved, make_pipeline, tmp_path):
    assert "| classes | 3 (`a`, `b`, `c`): `class_labels=` |" in card_text(saved)
    pipeline = make_pipeline(num_class_embeds=100)
    pipeline.unet.class_names = [f"c|{i}" for i in range(100)]
    pipeline.save_pretrained(tmp_path / "many")
    assert r"`c\|18`, `c\|19`, ...): `class_labels=`" in card_text(tmp_path / "many") and "c|20" not in card_text(
        tmp_path / "many"
    )


def test_numbers_are_of_the_usual_weights(make_pipeline, tmp_path):
    """Another variant beside them changes neither the digest nor what is published."""
    pipeline, folder = make_pipeline(), tmp_path / "both"
    pipeline.save_pretrained(folder)
    digest = weights_digest(folder)
    (folder / "training.json").write_text(json.dumps({**TRAINING, "weights": digest}))
    (folder / "evaluation.json").write_text(json.dumps({**EVALUATION, "weights": digest}))
    before = card_text(folder)
    pipeline.unet.half()
    pipeline.save_pretrained(folder, variant="fp16")
    assert weights_digest(folder) == digest and card_text(folder) == before and "| total | 3.0000 |" in before
    assert {"training.json", "evaluation.json", "unet/diffusion_pytorch_model.fp16.safetensors"} <= published_files(
        folder
    ).keys()
    pipeline.unet.float().conv_in.bias.data.add_(1)
    pipeline.save_pretrained(folder)
    assert weights_digest(folder) != digest and "Not measured" in card_text(folder)


@pytest.mark.slow
def test_configs_of_continuous_time_are_checked_too(make_pipeline, tmp_path):
    make_pipeline(scheduler=VPSDEScheduler()).save_pretrained(tmp_path / "vp")
    path = tmp_path / "vp/scheduler/scheduler_config.json"
    for others in mutated(json.loads(path.read_text())):
        path.write_text(json.dumps(others))
        refusals(tmp_path / "vp")


def test_numbers_of_schedulers_are_bounded(make_pipeline, tmp_path):
    from diffusers import UniPCMultistepScheduler

    pipeline = make_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler.from_config(VariationalDDPMScheduler().config)
    pipeline.save_pretrained(tmp_path / "x")
    path = tmp_path / "x/scheduler/scheduler_config.json"
    for key in ("solver_order", "num_train_timesteps"):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: 10**11}))
        assert f"{key}=100000000000 is beyond 1,000,000" in refusals(tmp_path / "x")["open"]


def test_what_reads_is_what_was_written(tmp_path):
    values = {"a": [1, -2.5, None, True, "é"], "b": {"c": {}}, "d": float("-inf")}
    (tmp_path / "x.json").write_text(json.dumps(values))
    assert read_json(tmp_path / "x.json") == values


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "classifier/config.json"])
def test_keys_that_would_replace_methods_of_a_config(saved, file):
    values = json.loads((saved / file).read_text())
    for key in ("get", "items", "__class__"):
        (saved / file).write_text(json.dumps({**values, key: 3}))
        assert all(f"{file}: '{key}' is no key of a config" in message for message in refusals(saved).values())


def test_a_network_opened_alone_names_its_config(saved):
    path = saved / "unet/config.json"
    values = json.loads(path.read_text())
    for content in (
        "[]",
        json.dumps({**values, "layers_per_block": "x"}),
        '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
        "{",
    ):
        path.write_text(content)
        with pytest.raises((ValueError, OSError), match="unet/config.json") as caught:
            DDPMUNet.from_pretrained(saved / "unet")
        assert "\n" not in str(caught.value)
