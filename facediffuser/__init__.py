"""Face-diffuser: two Stable Diffusion models joined by saliency-adaptive noise fusion, and a dataset factory."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["FaceDiffuserPipeline", "__version__"]


def __getattr__(name: str):
    # Lazy, so that reading a manifest or a plan does not import torch and diffusers.
    if name == "FaceDiffuserPipeline":
        return import_module("facediffuser.pipeline").FaceDiffuserPipeline
    raise AttributeError(f"module 'facediffuser' has no attribute {name!r}")
