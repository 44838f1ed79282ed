"""How busy a GPU is while something runs on it, at what clock and at what power: what tells a power limit from idle time."""

import importlib.util
import threading

import torch


class GpuLoad:
    """Asks the GPU's driver every 0.1 s how busy the GPU is, at what clock and power, as long as the block lasts."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> "GpuLoad":
        if torch.cuda.is_available() and importlib.util.find_spec("pynvml"):
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _ask(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._ended.wait(0.1):
            share = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
            clock = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
            self.seen.append((share, clock, pynvml.nvmlDeviceGetPowerUsage(device) / 1000))

    def line(self) -> str:
        """Return the means over the longest stretch in which the GPU never rested for a second: the shards."""
        stretches: list[list[tuple[int, int, float]]] = [[]]
        for number, one in enumerate(self.seen):
            if any(share for share, _, _ in self.seen[number : number + 10]):
                stretches[-1].append(one)
            elif stretches[-1]:
                stretches.append([])
        longest = max(stretches, key=len)
        if not longest:
            return "the GPU's busy share is not known"
        share, clock, power = (sum(values) / len(longest) for values in zip(*longest, strict=True))
        return f"GPU busy {share:.1f}% of the {len(longest) / 10:.0f} s of its longest stretch, {clock:.0f} MHz, {power:.0f} W"
