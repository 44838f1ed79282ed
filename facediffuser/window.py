"""The steps in which both models are fused: where they begin and end, by default and as given. Without torch."""


def default_fusion_window(steps: int) -> tuple[int, int]:
    """Return (fusion_start, fusion_end): the released 16 and 31 of 50 steps, scaled.

    Args:
        steps: inference steps.
    """
    return round(16 * steps / 50), round(31 * steps / 50)


def fusion_window(
    steps: int, start: int | None, end: int | None, default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the first step of both models and the first step of the SDM alone.

    Args:
        steps: inference steps.
        start: first fused step, None for the default.
        end: first step of the SDM alone, None for the default.
        default: what stands for None; `default_fusion_window(steps)` where it is left out.

    Raises:
        ValueError: the window ends before it begins, or lies behind the steps.
    """
    for name, value in (("fusion_start", start), ("fusion_end", end)):
        if value is not None and value > steps:
            raise ValueError(f"{name} {value} lies behind the {steps} steps; give at most {steps}")
    first, last = default or default_fusion_window(steps)
    first, last = first if start is None else start, last if end is None else end
    if first > last:
        raise ValueError(f"fusion window {first} to {last} of {steps} steps; let it start before it ends")
    return first, last
