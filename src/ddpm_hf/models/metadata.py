"""What a network's config says beside its architecture: the names of its classes and how its images were prepared."""

from typing import Any

from ddpm_hf.arguments import shown
from ddpm_hf.files.label_names import check_label_names
from ddpm_hf.files.saved_config import package_only

PREPROCESSING = ("background", "crop", "image_column", "label_column")


class NetworkMetadata:
    """Class names and preprocessing under the key "_ddpm_hf" of the config; diffusers ignores keys with an underscore."""

    config: Any  # of diffusers' `ConfigMixin`

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels 0, 1, ..., all different; None where they are not known. Setting them changes the config.

        There may be fewer names than `num_classes`: the last labels then have none.

        Raises:
            ValueError: not a list of different texts, or more than there are classes.
        """
        names = self.own_settings().get("class_names")
        return None if names is None else self._check_class_names(names)

    @class_names.setter
    def class_names(self, names: list[str] | None) -> None:
        self._set(class_names=None if names is None else check_label_names(self._check_class_names(names)))

    @property
    @package_only
    def preprocessing(self) -> dict[str, str]:
        """How the training images were prepared, as far as it is known. Setting it changes the config.

        Keys: "background" and "crop" as in `ddpm_hf.data.image_to_pixels`; "image_column" and "label_column", names of the
        data set's columns.

        Raises:
            ValueError: not texts by these keys.
        """
        return _check_preprocessing(self.own_settings().get("preprocessing") or {})

    @preprocessing.setter
    @package_only
    def preprocessing(self, values: dict[str, str] | None) -> None:
        self._set(preprocessing=_check_preprocessing(values or {}) or None)

    def own_settings(self) -> dict:
        """The settings of this package in the config, under "_ddpm_hf".

        Raises:
            ValueError: the config holds something else there.
        """
        return own_settings_of(self.config)

    def _set(self, **settings):
        settings = {**self.own_settings(), **settings}
        self.register_to_config(_ddpm_hf={key: value for key, value in settings.items() if value is not None})

    def _check_class_names(self, names):
        texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not texts or not names or len(set(names)) < len(names):
            raise ValueError(f"class_names={shown(names)} must be a list of different texts, one for each label")
        if len(names) > (self.num_classes or 0):
            raise ValueError(
                f"class_names={shown(names)} has {len(names)} names, but this network has "
                f"{self.num_classes or 'no'} classes; give one for each label"
            )
        return list(names)


def own_settings_of(config: dict) -> dict:
    """The settings of this package in a network's config. Raises as `NetworkMetadata.own_settings`."""
    settings = config.get("_ddpm_hf") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"_ddpm_hf={shown(settings)} in the network's config must hold keys and values")
    return settings


def _check_preprocessing(values):
    if not isinstance(values, dict) or not all(
        name in PREPROCESSING and isinstance(value, str) for name, value in values.items()
    ):
        raise ValueError(f"preprocessing={shown(values)} must have texts by the keys {', '.join(PREPROCESSING)}")
    return dict(values)
