"""The pipeline.py that is published beside weights: what it holds, and that it works without the package."""

import ast
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf import (
    CascadePipeline,
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    DDPMUNet,
    NoisyClassifier,
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    __version__,
)
from ddpm_hf.hub import source
from ddpm_hf.hub.source import published_source
from support.elsewhere import ROUNDING, run_elsewhere
from support.versions import needs

DDPM = (DDPMImagePipeline, DDPMUNet, VariationalDDPMScheduler)
CASCADE = (CascadePipeline, DDPMSuperResolutionPipeline, *DDPM)
FILES = {
    "ddpm": DDPM,
    "guided": (*DDPM, NoisyClassifier),
    "vp": (DDPMImagePipeline, DDPMUNet, VPSDEScheduler),
    "super_resolution": (DDPMSuperResolutionPipeline, DDPMUNet, VariationalDDPMScheduler),
    "cascade": CASCADE,
    "classifier": (NoisyClassifier,),
    "all": (*CASCADE, NoisyClassifier, VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler),
}


def definitions(text):
    return [node.name for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_nothing_of_the_package(name):
    text = published_source(FILES[name])
    compile(text, "pipeline.py", "exec")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "ddpm_hf" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.partition(".")[0] != "ddpm_hf"
    assert {cls.__name__ for cls in FILES[name]} <= {*definitions(text)}


@pytest.mark.parametrize("name", FILES)
def test_a_name_stands_for_one_thing(name):
    """Definitions of many modules become one module: a name of two would stand for the last."""
    tree = ast.parse(published_source(FILES[name]))
    names = definitions(ast.unparse(tree))
    for node in tree.body:
        names += [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        names += [alias.asname or alias.name for alias in getattr(node, "names", ())]
    assert len(names) == len(set(names))


# no uploader, compiler, optimized network, allocator, reader of guarded files or checker of weights
FORBIDDEN = (
    "huggingface_hub", "HfApi", "upload", "torch.compile(", "_inductor", "InferenceUNet", "Winograd", "mallopt", "ctypes",
    "read_json", "check_file", "safetensors", "load_state_dict(file", "subprocess", "importlib",
)  # fmt: skip
MODULES = {
    "contextlib",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
    "inspect",
    "json",
    "math",
    "numbers",
    "operator",
    "os",
}
MODULES |= {"collections", "pathlib", "re", "reprlib", "threading", "typing", "weakref", "numpy", "torch", "diffusers"}


@pytest.mark.parametrize("name", ["ddpm", "guided", "vp"])
def test_network_scheduler_and_pipeline_and_nothing_else(name):
    text = published_source(FILES[name])
    assert [word for word in FORBIDDEN if word in text] == []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {module.partition(".")[0] for module in names} <= MODULES
    absent = {"NoisyClassifier", "VPSDEScheduler", "VariationalDDPMScheduler"} - {cls.__name__ for cls in FILES[name]}
    assert absent.isdisjoint(definitions(text))


def test_size():
    """About half of what version 0.1.0 published: 277,421 bytes beside every network."""
    for name, most in (("ddpm", 158_000), ("vp", 151_000), ("classifier", 64_500)):
        assert len(published_source(FILES[name]).encode()) < most


def test_the_header_says_what_it_is():
    text = published_source(DDPM)
    header = ast.get_docstring(ast.parse(text))
    assert header.startswith("DDPMImagePipeline ") and f"ddpm-hf {__version__}" in header and "models/unet.py" in header
    assert max(map(len, text.splitlines())) <= 128
    assert '"""Draws images by running a diffusion process backwards' in text  # docstrings, and comments
    assert "# the timesteps stay on the CPU" in text


PACKAGE = {
    "a": """
        import math
        from collections.abc import (
            Callable,
            Iterable as Many,
        )
        from ddpm_hf.c import checked_arguments, package_only
        from ddpm_hf.b import (
            Base,  # wrapped, with a comment
            decorate,
        )

        class Saved(Base):
            stock_class = None

            @checked_arguments(
                shapes=RANGE,
            )
            @decorate
            def area(self, shapes: Many) -> Callable:
                return math.pi * SIZES["small"]

            # for experts
            @package_only
            def volume(self):
                return unused()

            @package_only
            def _private(self):
                return unused()

            last = 3

        RANGE = "[0, 1]"

        # how large
        # things are
        SIZES = {"small": 1}
        SIZES["large"] = 2
        SIZES |= {"huge": 3}  # at the end

        def unused():
            return sum
    """,
    "b": """
        from ddpm_hf.c import helper

        class Base:
            pass

        def decorate(function):
            return helper(function)
    """,
    "c": "helper = checked_arguments = package_only = 3\n",
}


STAND_INS = """
def helper(function):
    return function


def brought_by_package(name):
    return name
"""


def write_package(folder, monkeypatch, **files):
    for name, text in {**PACKAGE, **files}.items():
        lines = text.splitlines()
        (folder / f"{name}.py").write_text("\n".join(line.removeprefix("        ") for line in lines) + "\n")
    (folder / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.setattr(source, "PACKAGE", folder)
    monkeypatch.setattr(source, "STAND_INS", "ddpm_hf.stand_ins")
    monkeypatch.setattr(source, "_module", source._Module)
    return source._File((source.Definition("ddpm_hf.a", "Saved"),))


def test_what_a_class_uses_goes_with_it(tmp_path, monkeypatch):
    text = write_package(tmp_path, monkeypatch).text()
    # in the order of use, the stand-ins first
    assert definitions(text) == ["helper", "brought_by_package", "Base", "decorate", "Saved"]
    assert "# how large\n# things are\nSIZES = " in text and "# at the end" in text and "unused" not in text
    assert "import math\nfrom collections.abc import Callable, Iterable as Many\n" in text
    scope = {}
    exec(compile(text, "pipeline.py", "exec"), scope)
    assert not {"RANGE", "checked_arguments", "package_only", "experts", "_private"} & {*text.split()}
    assert scope["Saved"].volume == "volume" and scope["Saved"].last == 3
    assert scope["Saved"]().area(()) == np.pi and scope["SIZES"] == {"small": 1, "large": 2, "huge": 3}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("c", "import os\nhelper = checked_arguments = package_only = os\n", None),
        (
            "b",
            PACKAGE["b"] + "\n        SIZES = decorate\n        Base.sizes = SIZES\n",
            "SIZES means different things in",
        ),
        ("b", "from ddpm_hf.c import helper as decorate\nBase = 3\n", "an import of this package under another name"),
        ("b", "Base = decorate = 3\nprint(Base)\n", "b.py, line 2: this statement cannot be published"),
    ],
)
def test_what_cannot_be_one_file_is_refused(tmp_path, monkeypatch, name, text, message):
    if message is None:
        write_package(tmp_path, monkeypatch, **{name: text}).text()
    else:
        with pytest.raises(ValueError, match=message):
            write_package(tmp_path, monkeypatch, **{name: text})


# what was published by 0.1.0, and what each folder drew


@pytest.fixture(scope="module")
def published_0_1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(Path(__file__).with_name("published_0_1.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


CALLS = {
    "ddpm": {},
    "sde": {},
    "guided": {"class_labels": [1, 2], "classifier_scale": 2.0},
    "cascade": {"upsampler_steps": 4},
}


def check_images(folder, name, images):
    mean, std, first = json.loads((folder / "images.json").read_text())[name]
    assert (images.mean(), images.std()) == (pytest.approx(mean, abs=1e-4), pytest.approx(std, abs=1e-4))
    np.testing.assert_allclose(images.flatten()[:16], first, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_folders_of_0_1_open_with_the_package(published_0_1, name):
    cls = CascadePipeline if name == "cascade" else DDPMImagePipeline
    pipe = cls.from_pretrained(published_0_1 / name)
    check_images(published_0_1, name, pipe(2, torch.Generator().manual_seed(1), 4, "np", **CALLS[name]).images)


OPEN = """
    import json, sys
    sys.modules["ddpm_hf"] = None  # not importable
    import diffusers, numpy, torch
    folder, out, kwargs = sys.argv[1:]
    index = json.load(open(f"{folder}/model_index.json"))
    ours = {"custom_pipeline": folder} if index["_class_name"] == "DDPMPipeline" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **ours)
    images = pipe(2, torch.Generator().manual_seed(1), 4, "np", **json.loads(kwargs)).images
    numpy.save(out, images)
    for name in ("push_to_hub", "optimize"):
        try:
            getattr(pipe, name)("user/x")
        except Exception as error:
            print(type(error).__name__, error)
    pipe.save_pretrained(f"{out}-again")
"""


OWN_CODE = needs("diffusers", "0.41", "it calls `_dict_from_json_file` with an argument that 0.1.0 did not expect")


# each takes a process of its own, some of them in make test-slow
KEPT = ["ddpm"] + [
    pytest.param(name, marks=[OWN_CODE, *([pytest.mark.slow] if name in ("guided", "sde") else [])])
    for name in CALLS
    if name != "ddpm"
]


@pytest.mark.parametrize("name", KEPT)
def test_folders_of_0_1_open_with_their_own_code(published_0_1, tmp_path, name):
    run_elsewhere(
        OPEN,
        tmp_path / "home",
        published_0_1 / name,
        tmp_path / "out.npy",
        json.dumps(CALLS[name]),
        package=False,
        offline=True,
    )
    check_images(published_0_1, name, np.load(tmp_path / "out.npy"))


@pytest.mark.parametrize("name", CALLS)
def test_what_is_saved_now_works_without_the_package(published_0_1, tmp_path, name):
    """It draws the same images, says in one line what only the package can do, and saves itself as it was."""
    cls = CascadePipeline if name == "cascade" else DDPMImagePipeline
    pipe = cls.from_pretrained(published_0_1 / name)
    pipe.save_pretrained(tmp_path / "saved")
    printed = run_elsewhere(
        OPEN,
        tmp_path / "home",
        tmp_path / "saved",
        tmp_path / "out.npy",
        json.dumps(CALLS[name]),
        package=False,
        offline=True,
    )
    check_images(published_0_1, name, np.load(tmp_path / "out.npy"))
    lines = printed.splitlines()
    assert lines[0] == (
        "ImportError push_to_hub is brought by the package ddpm-hf: pip install ddpm-hf, then "
        f"ddpm_hf.{cls.__name__}.from_pretrained(...) opens this pipeline"
    )
    assert name == "cascade" or lines[1] == lines[0].replace("push_to_hub", "optimize")
    resaved = tmp_path / "out.npy-again"
    files = {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert files == {path.relative_to(resaved) for path in resaved.rglob("*") if path.is_file()}
    for file in files:
        assert (resaved / file).read_bytes() == (tmp_path / "saved" / file).read_bytes(), file
    opened = cls.from_pretrained(resaved)
    images = opened(2, torch.Generator().manual_seed(1), 4, "np", **CALLS[name]).images
    np.testing.assert_allclose(images, np.load(tmp_path / "out.npy"), atol=ROUNDING)


@pytest.mark.parametrize("name", ["sde", pytest.param("guided", marks=pytest.mark.slow)])
def test_stages_whose_parts_no_stock_class_opens(published_0_1, tmp_path, name):
    """diffusers opens a stage by its class, without its consent to run the code of the stage's parts once more."""
    base = DDPMImagePipeline.from_pretrained(published_0_1 / name)
    pipe = CascadePipeline(base, CascadePipeline.from_pretrained(published_0_1 / "cascade").upsampler)
    kwargs = {**CALLS[name], "upsampler_steps": 4}
    images = pipe(2, torch.Generator().manual_seed(1), 4, "np", **kwargs).images
    pipe.save_pretrained(tmp_path / "saved")
    assert len({path.read_bytes() for path in (tmp_path / "saved").rglob("pipeline.py")}) == 1
    argv = tmp_path / "home", tmp_path / "saved", tmp_path / "out.npy", json.dumps(kwargs)
    run_elsewhere(OPEN, *argv, package=False, offline=True)
    np.testing.assert_allclose(images, np.load(tmp_path / "out.npy"), atol=ROUNDING)


def test_parts_given_in_place_of_the_folders_own(published_0_1, tmp_path):
    DDPMImagePipeline.from_pretrained(published_0_1 / "sde").save_pretrained(tmp_path)
    file = tmp_path / "pipeline.py"
    scope = {"__name__": "published", "__file__": str(file)}
    exec(compile(file.read_text(), file, "exec"), scope)
    scheduler = scope["VPSDEScheduler"](num_train_timesteps=7)
    pipe = scope["DDPMImagePipeline"].from_pretrained(tmp_path, scheduler=scheduler)
    assert pipe.scheduler is scheduler and type(pipe.unet) is scope["DDPMUNet"]
