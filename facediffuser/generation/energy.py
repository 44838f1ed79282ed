"""What a GPU's own meter says: joules since its driver was loaded, from NVML, which comes with the driver."""

import ctypes

import torch

NVML = "libnvidia-ml.so.1"


def energy_meter(device: torch.device) -> "EnergyMeter | None":
    """Return the meter of a worker's device, None for a CPU and for a GPU without one (older than Volta)."""
    if device.type != "cuda":
        return None
    try:
        meter = EnergyMeter(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        meter.joules()
    except (OSError, AttributeError):
        return None
    return meter


class EnergyMeter:
    """The meter of one GPU; `joules()` counts on from when the driver was loaded.

    Raises:
        OSError: NVML is not there, or does not know the GPU or its energy.
        AttributeError: NVML is too old to tell.
    """

    def __init__(self, uuid: str, library: ctypes.CDLL | None = None):
        self._nvml = library or ctypes.CDLL(NVML)
        self._device = ctypes.c_void_p()
        _require(self._nvml.nvmlInit_v2())
        _require(self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._device)))

    def joules(self) -> float:
        """Return the energy so far, J."""
        millijoules = ctypes.c_ulonglong()
        _require(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules)))
        return millijoules.value / 1000


def _require(code: int) -> None:
    if code != 0:
        raise OSError(f"NVML answers {code}")
