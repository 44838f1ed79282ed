"""The device that `--device` stands for."""

from facediffuser.errors import InputError


def pick_device(name: str) -> str:
    """Return the device for torch.

    Args:
        name: `cpu`, `cuda`, `cuda:N` or `auto`.

    Returns:
        `name`; for `auto` `cuda` where there is a GPU and `cpu` elsewhere.

    Raises:
        InputError: a GPU that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError(f"--device {name}: no GPU that torch can use; give cpu")
        if int(name.partition(":")[2] or 0) >= count:
            raise InputError(f"--device {name}: there are {count} GPUs, counted from 0; give another or cpu")
    return name
