"""Numbers and times as people read them; one spelling for badge, table and picture."""


def number(value: float) -> str:
    """Return four significant digits."""
    return f"{value:.4g}"


def clock(seconds: float | None) -> str:
    """Return minutes and seconds, with hours where there are any; a dash for the unknown."""
    if seconds is None:
        return "—"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
