"""Numbers as a person reads them: "1 image", "2,480 images", "2 h 05 min"."""


def counted(count: int, noun: str, several: str = "") -> str:
    """Return a count with its noun in the right number.

    Args:
        count: 0 or more; thousands are set apart by commas.
        noun: what one of them is called, "failed row".
        several: what two of them are called; the noun with an s where it is not given.
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def duration(seconds: float) -> str:
    """Return hours and minutes, minutes and seconds, or seconds; "unknown time" for NaN."""
    if seconds != seconds:
        return "unknown time"
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
