"""Small replacements, in a published pipeline.py, for classes and functions of the package; see `source.py`."""

import inspect
import os
from pathlib import Path

import diffusers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def brought_by_package(name):
    """Returns a method that raises ImportError when it is called: only the package has it."""

    def method(self, *args, **kwargs):
        pipeline = type(self).__name__ if isinstance(self, DiffusionPipeline) else "DDPMImagePipeline"
        raise ImportError(
            f"{name} is brought by the package ddpm-hf: pip install ddpm-hf, then ddpm_hf.{pipeline}.from_pretrained(...) "
            "opens this pipeline"
        )

    return method


def check_argument(name, value, annotation, allowed=None):
    """Returns the value unchecked; the package checks it."""
    return value


def check_config(config, network):
    """Does nothing; the package checks the config of a network."""


def check_chain_keys(*keys):
    """Does nothing; the package checks errors of x_0 and lists of timesteps."""


def check_label_names(names):
    """Returns the names of labels unchecked; the package checks them."""
    return names


def classifier_gradient(pipeline, class_labels, classifier_scale, batch_size):
    """Returns None, for no guidance. Raises ValueError if a scale is given: the pipeline was saved without a classifier."""
    if classifier_scale is not None:
        raise ValueError(
            f"classifier_scale={classifier_scale} needs a classifier, which this pipeline was saved without"
        )


class GuardedConfig:
    """Base class of networks and schedulers. The package also checks configs when it opens and saves them."""

    published_source = Path(__file__).read_bytes()  # now: diffusers puts the next file of this name in its place


class CheckedModel(GuardedConfig, ModelMixin, ConfigMixin):
    """Base class of networks. The package also checks weights when it opens and saves them."""


class PackagedPipeline:
    """Base class of pipelines. With the package, they can also be published."""

    published_source = Path(__file__).read_bytes()

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Reads the index as diffusers' method does. Where it names a class as [module, class], keeps the name of the class."""
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        if isinstance(index["_class_name"], list):
            index["_class_name"] = index["_class_name"][-1]
        return config

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and this file; beside the config of a part, the file with its class."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        for name, part in {".": self, **self.components}.items():
            if source := getattr(part, "own_source", None):
                file = Path(save_directory, name, f"{source}.py")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(part.published_source)

    push_to_hub = brought_by_package("push_to_hub")


class PackagedImagePipeline(PackagedPipeline):
    """Base class of image pipelines. With the package, they can also be published and made faster."""

    optimize = brought_by_package("optimize")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Opens a folder or repository as diffusers' method does.

        If no stock class can open one of the parts, all parts are opened with the classes of this file. A cascade opens its
        stages in this way, because diffusers would ask for `trust_remote_code` once more.
        """
        path, download_names = pretrained_model_name_or_path, ("cache_dir", "local_files_only", "revision", "token")
        download_kwargs = {name: kwargs[name] for name in download_names if name in kwargs}
        index = cls.load_config(path, **download_kwargs)
        names = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and type(entry[1]) is str}
        classes = {part: globals().get(name) or getattr(diffusers, name) for part, name in names.items()}
        if not any(getattr(part_class, "source_name", None) for part_class in classes.values()):
            return super().from_pretrained(path, **kwargs)
        components = {part: kwargs[part] for part in classes if part in kwargs}
        for part in classes.keys() - components.keys():
            weights = {
                name: kwargs[name] for name in ("torch_dtype", "variant") if name in kwargs and part != "scheduler"
            }
            components[part] = classes[part].from_pretrained(path, subfolder=part, **download_kwargs, **weights)
        setting_names = inspect.signature(cls).parameters.keys() - classes
        settings = {name: index[name] for name in setting_names if index.get(name) not in (None, [None, None])}
        return cls(**components, **settings)

    def _network(self, timesteps):
        return self.unet


class PackagedCascade(PackagedPipeline):
    """Base class of a pipeline of pipelines. With the package, it can also be published."""
