"""Face-diffuser: two Stable Diffusion models joined by saliency-adaptive noise fusion, and a dataset factory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from facediffuser.extras import missing_extra

if TYPE_CHECKING:
    from facediffuser.pipeline import FaceDiffuserPipeline

__version__ = "0.1.0"
__all__ = ["FaceDiffuserPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that reading a manifest or a plan does not import torch and diffusers.
    if name == "FaceDiffuserPipeline":
        try:
            return import_module("facediffuser.pipeline").FaceDiffuserPipeline
        except ModuleNotFoundError as error:
            if line := missing_extra(error):
                raise ModuleNotFoundError(f"FaceDiffuserPipeline: {line}", name=error.name) from error
            raise
    raise AttributeError(f"module 'facediffuser' has no attribute {name!r}")
