"""Numbers and texts as people read them: durations, sizes, a text on one line, a text that is shown and not obeyed."""

import re

# Control characters, which a terminal obeys: colours, titles, the clipboard, moves of the cursor. And those that change
# the direction of a text, or are not seen. Newline and tab stay. Half of a surrogate pair cannot be written at all.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
COMMAND = "  python -m "  # how a line begins that is to be copied, and so is never folded
MARKDOWN = re.compile(r"([\\`*\[\]!|~])")


def plain(text: str) -> str:
    """Return a text with its control characters written out, as \\x1b, so that a terminal shows them."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown_text(text: object) -> str:
    """Return a text that Markdown shows as it is, on one line: no link, image, table cell, HTML or code in it."""
    line = " ".join(plain(str(text)).split())
    return MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_code(text: object) -> str:
    """Return a text as Markdown code, on one line, whatever backticks it holds."""
    line = " ".join(plain(str(text)).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


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
