"""What `pip install ddpm-hf` brings: the wheel in an empty environment, the sdist, and the extras that are not installed."""

import ast
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

import ddpm_hf
from support.scripts import ROOT

BASE = ("torch", "diffusers", "accelerate", "huggingface_hub", "safetensors", "numpy", "PIL", "tqdm", "jinja2")
EXTRAS = ("datasets", "torchdiffeq", "matplotlib", "psutil", "sklearn", "mlxtend", "transformers", "pandas", "scipy")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A function that runs a console script of an environment with the wheel, from an empty folder."""
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # packages of this environment, but not what its own .pth files lead to: this checkout
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *built.glob("*.whl")], check=True, capture_output=True)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *argv):
        return subprocess.run(
            [environment / "bin" / program, *map(str, argv)],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**variables, "HF_HUB_OFFLINE": "1"},
        )

    run.folder, run.packages = folder, packages
    return run


@pytest.mark.slow
def test_the_wheel_trains_samples_measures_and_pushes_from_any_folder(installed):
    place = installed("python", "-c", "import ddpm_hf; print(ddpm_hf.__file__)").stdout.strip()
    assert place == str(installed.packages / "ddpm_hf/__init__.py")
    for argv, output in (
        (["train", "--config", "digits", "--steps", 2], "saved runs/digits/pipeline"),
        (["sample", "runs/digits/pipeline", "--count", 4, "--steps", 2], "wrote samples.png"),
        (
            ["evaluate", "runs/digits/pipeline", "--images", 4, "--estimate", 8],
            "wrote {}/runs/digits/pipeline/evaluation.json",
        ),
    ):
        result = installed("ddpm-hf", *argv)
        assert result.returncode == 0 and output.format(installed.folder) in result.stdout, result.stderr[-3000:]
    for path in ("pipeline/README.md", "pipeline/pipeline.py", "config.yaml", "curves.png"):
        assert (installed.folder / "runs/digits" / path).stat().st_size > 100
    refused = installed("ddpm-hf", "push", "runs/digits", "--repo_id", "user/digits")
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("ddpm-hf push: ")
    assert "Traceback" not in refused.stderr


def test_what_the_wheel_and_the_sdist_hold(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for path in (ROOT / "training/configs").rglob("*.yaml"):
        assert f"ddpm_hf/configs/{path.relative_to(ROOT / 'training/configs')}" in names
    for path in (ROOT / "src/ddpm_hf").rglob("*.py"):
        assert f"ddpm_hf/{path.relative_to(ROOT / 'src/ddpm_hf')}" in names
    assert {"ddpm_hf/model_card.md", "ddpm_hf/py.typed"} <= names
    assert all(name.startswith(("ddpm_hf/", "ddpm_hf-")) for name in names)
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    assert set(tracked.stdout.split()) - names <= {".gitattributes"}


def test_type_checkers_see_the_public_names():
    """The imports in __init__.py that only they read are those of `MODULES`."""
    tree = ast.parse((ROOT / "src/ddpm_hf/__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports = [node for node in imports if node.module not in ("typing", "ddpm_hf.version")]
    imported = {(node.module.removeprefix("ddpm_hf."), alias.asname) for node in imports for alias in node.names}
    assert imported == {(module, name) for module, names in ddpm_hf.MODULES.items() for name in names}


def test_sampling_needs_no_extra(tmp_path):
    """Import of all public names, sampling, saving, opening, the bound and the model card."""
    code = f"""
        import sys
        sys.modules |= dict.fromkeys({EXTRAS})
        import torch
        import ddpm_hf
        from ddpm_hf.evaluation.samples import draw_samples, open_pipeline
        from ddpm_hf.hub.card import write_model_card
        public = [getattr(ddpm_hf, name) for name in ddpm_hf.__all__]
        unet = ddpm_hf.DDPMUNet(
            8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )
        scheduler = ddpm_hf.VariationalDDPMScheduler(num_train_timesteps=4)
        ddpm_hf.DDPMImagePipeline(unet, scheduler).save_pretrained("pipeline")
        write_model_card("pipeline")
        pipeline = open_pipeline("pipeline")
        draw_samples(pipeline, 2).picture().save("samples.png")
        x_start = -torch.ones(2, 1, 8, 8)
        print(ddpm_hf.bits_per_dim(pipeline.unet, pipeline.scheduler, x_start).total.shape)
        try:
            ddpm_hf.ode_bits_per_dim(pipeline.unet, pipeline.scheduler, x_start)
        except ImportError as error:
            print(error)
        try:
            import ddpm_hf.data
        except ImportError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shape, ode, data = result.stdout.splitlines()
    assert shape == "torch.Size([2])"
    assert ode.startswith('likelihoods and encodings by the ODE need torchdiffeq; pip install "ddpm-hf[ode]"')
    assert data.startswith('data sets need datasets; pip install "ddpm-hf[data]"')


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [
        (["train", "--config", "digits"], "datasets", "train"),
        (["train", "--config", "digits"], "matplotlib", "train"),
        (["train", "--config", "digits"], "yaml", "train"),
        (["evaluate", "pipeline"], "datasets", "data"),
        (["evaluate", "pipeline", "--ode"], "torchdiffeq", "ode"),
        (["evaluate", "pipeline"], "matplotlib", "eval"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(tmp_path, argv, package, extra):
    """In one line, before torch is imported."""
    code = f"import sys; sys.modules[{package!r}] = None; from ddpm_hf.cli import main; main({argv})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith(f"ddpm-hf {argv[0]}: ")
    assert f'need {package}; pip install "ddpm-hf[{extra}]"' in line
