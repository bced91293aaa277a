"""Image processors with the interface of transformers, on top of `keye_kernels.processing`."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from keye_kernels.editions import PREVIEW, V1_5, EditionName
from keye_kernels.processing.arguments import list_images
from keye_kernels.processing.edition_marks import check_edition
from keye_kernels.processing.patches import STEPS, PatchConfig

SETTINGS = (
    *("min_pixels", "max_pixels", "size", "patch_size", "merge_size", "temporal_patch_size"),
    *("image_mean", "image_std", "rescale_factor", "resample", *STEPS),
)
# Arguments of transformers' image processors without effect here: images are always converted to RGB on the CPU
IGNORED_ARGUMENTS = ("do_convert_rgb", "device", "disable_grouping", "input_data_format", "data_format")


class SiglipImageProcessor(BaseImageProcessor):
    """The image processor of Preview. Its checkpoints use this name, which is also that of another class in transformers.

    Attributes can be changed and take effect in the next call.

    Args:
        **settings: content of `preprocessor_config.json`.

    Attributes:
        size: {"min_pixels": ..., "max_pixels": ...}, limits of the area of a resized image.
        min_pixels, max_pixels: the entries of `size`; can be set.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012 - transformers reads a class attribute
    edition: EditionName = PREVIEW.name

    def __init__(self, **settings: Any):
        config = PatchConfig.from_dict(settings, self.edition)
        super().__init__(**{name: value for name, value in settings.items() if name not in SETTINGS})
        self.size = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        self.patch_size, self.merge_size, self.temporal_patch_size = config.patch_size, config.merge_size, 1
        self.image_mean, self.image_std = list(config.norm.image_mean), list(config.norm.image_std)
        self.rescale_factor, self.resample = config.norm.rescale_factor, config.resample
        self.do_resize = self.do_rescale = self.do_normalize = True

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Creates a processor from the content of `preprocessor_config.json`. Settings in `kwargs` replace those of the file."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        processor = cls(**{**image_processor_dict, **given})
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """Adds `min_pixels` and `max_pixels`, which the official code reads."""
        return {**super().to_dict(), **self.size}

    @property
    def min_pixels(self) -> int:
        return self.size["min_pixels"]

    @min_pixels.setter
    def min_pixels(self, value: int) -> None:
        self.size = {**self.size, "min_pixels": value}

    @property
    def max_pixels(self) -> int:
        return self.size["max_pixels"]

    @max_pixels.setter
    def max_pixels(self, value: int) -> None:
        self.size = {**self.size, "max_pixels": value}

    def patch_config(self, overrides: Mapping[str, Any] | None = None) -> PatchConfig:
        """The settings for `keye_kernels.processing`, with `overrides` for one call."""
        overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
        values = {name: getattr(self, name) for name in SETTINGS}
        if "size" in overrides:
            # Otherwise the processor's own limits would take precedence
            values.update(min_pixels=None, max_pixels=None)
        return PatchConfig.from_dict({**values, **overrides}, self.edition)

    def preprocess(self, images: Any, return_tensors: str = "pt", **overrides: Any) -> BatchFeature:
        """Resizes and normalizes images and cuts them into patches.

        Args:
            images: an image or a list of images: PIL images, arrays, tensors, paths or URLs.
            return_tensors: "pt".
            **overrides: settings for this call.

        Returns:
            pixel_values [T, 3, 14, 14] float32 and image_grid_thw [n, 3].

        Raises:
            ValueError: there is no image, or a setting or `return_tensors` is not supported.
            TypeError: unknown argument.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        unknown = [name for name in overrides if name not in (*SETTINGS, *IGNORED_ARGUMENTS)]
        if unknown:
            raise TypeError(f"unexpected keyword arguments {unknown}: this image processor takes {list(SETTINGS)}")
        config = self.patch_config({name: overrides[name] for name in SETTINGS if name in overrides})
        images = list_images(images)
        check_edition(self.edition, images=images)
        if not images:
            raise ValueError("images must contain at least one image, got none")
        pixels, grids = config.images_to_patches(images, self.edition, "float32")
        return BatchFeature({"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)})

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


class KeyeVL1_5ImageProcessor(SiglipImageProcessor):
    """The image processor of 1.5, which drops the alpha channel and by default resizes bilinearly."""

    edition: EditionName = V1_5.name


IMAGE_PROCESSORS = {PREVIEW.model_type: SiglipImageProcessor, V1_5.model_type: KeyeVL1_5ImageProcessor}
