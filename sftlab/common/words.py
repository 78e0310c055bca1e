"""Numbers and texts as people read them: durations, sizes, a text on one line."""


def one_line(text: str, most: int = 160) -> str:
    """Return the text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def end_of(text: str, most: int = 480) -> str:
    """Return the end of a text, on one line: in a prompt, what is asked comes last."""
    line = " ".join(text.split())
    return line if len(line) <= most else "... " + line[4 - most :].partition(" ")[2]


def duration(seconds: float) -> str:
    """Return seconds as people say them: 48 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: int) -> str:
    """Return a size as people say it: 12 B, 3.4 MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
