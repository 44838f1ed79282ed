"""Files of weights that a scorer's name carries, and sessions of ONNX Runtime."""

from pathlib import Path
from typing import Any

from facediffuser.errors import InputError, first_line
from facediffuser.extras import require_extra
from facediffuser.storage import local_copy


def scorer_file(scorer: str, url: str) -> Path:
    """Return the local copy of the file that a scorer `scorer:URL` is to use.

    Raises:
        InputError: there is no file.
    """
    path = local_copy(url)
    if not path.is_file():
        raise InputError(f"{scorer}:{url}: not a file; give the weights' path")
    return path


def onnx_session(path: Path, device: str) -> Any:
    """Return an ONNX Runtime session of a model; `device` is torch's name of where it runs.

    Raises:
        InputError: the file is no model, or the extra `onnx` is not installed.
    """
    require_extra("onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not device.startswith("cuda"):
        import torch

        options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    available = onnxruntime.get_available_providers()
    providers = [name for name in wanted if name in available] + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common base but Exception
        raise InputError(f"{path}: not a model that ONNX Runtime loads ({first_line(error)}); give another") from None


def read_state(path: Path) -> dict[str, Any]:
    """Return the tensors of a file by name: safetensors, or a checkpoint of torch, which is read with weights_only.

    Raises:
        Exception: whatever the libraries raise at a damaged file.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
