"""The pictures in docs/pictures: the demo in a terminal, the report of a run of it in a browser, a preview of its data.

    make pictures

All are real. It takes some minutes on two CPU cores. Terminals become SVG: the command runs in a pseudo-terminal, what
it prints is put together as a terminal would, and rich draws that. The report needs a Chromium on PATH.
"""

import fcntl
import gzip
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME, TerminalTheme
from rich.text import Text

REPO = Path(__file__).resolve().parents[1]
PICTURES = REPO / "docs" / "pictures"
ASSETS = REPO / "sftlab" / "assets" / "demo"
COLUMNS = 110
CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")
FONTS = "'DejaVu Sans Mono', Menlo, Consolas, monospace"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Rich's colours, but what is learned is black on a light green: its own black on green is hard to read.
NORMAL = [tuple(SVG_EXPORT_THEME.ansi_colors[i]) for i in range(8)]
NORMAL[0], NORMAL[2] = (0, 0, 0), (138, 206, 104)
THEME = TerminalTheme((30, 32, 36), (214, 216, 218), NORMAL)

Cell = tuple[str, str]  # a character and the numbers of its style


def main() -> None:
    """Make all of them."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.jsonl").write_bytes(gzip.decompress((ASSETS / "train.jsonl.gz").read_bytes()))
        preview = "sftlab.preview data=squad data.path=train.jsonl model=demo data.row_length=512 rows=1"
        shown = lines_of(in_terminal(preview.split(), folder))
        end = next(i for i, line in enumerate(shown) if text_of(line).startswith("training "))
        draw(shown[: end - 1], preview, PICTURES / "preview.svg")
        train = "sftlab.train name=demo"
        draw(lines_of(in_terminal(train.split(), folder)), train, PICTURES / "console.svg")
        in_terminal(["sftlab.train", "name=curves", "trainer.eval_every=25"], folder)
        (report,) = folder.glob("runs/curves/*/report.html")
        photograph(report, PICTURES / "report.png", 1100, 1272)


def in_terminal(arguments: list[str], folder: Path) -> str:
    """Return all that a command prints into a terminal of COLUMNS columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    printed = b""
    try:
        while part := os.read(parent, 1 << 16):
            printed += part
    except OSError:  # Linux says so when the command has ended
        pass
    if process.wait() != 0:
        raise SystemExit(printed.decode())
    return printed.decode()


def lines_of(printed: str) -> list[list[Cell]]:
    """Return what a terminal shows in the end: line feeds, returns, cursor up, erased lines and styles are obeyed."""
    lines: list[list[Cell]] = [[]]
    row = column = at = 0
    style = ""
    while at < len(printed):
        found = CONTROL.match(printed, at)
        if found:
            at = found.end()
            numbers, what = found.groups()
            if what == "m":
                style = "" if numbers in ("", "0") else f"{style};{numbers}".strip(";")
            elif what == "A":
                row = max(0, row - int(numbers or 1))
            elif what == "K":
                lines[row] = [] if numbers == "2" else lines[row][:column]
            continue
        character = printed[at]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [[] for _ in range(row + 1 - len(lines))]
        elif character.isprintable():
            lines[row] += [(" ", "")] * (column + 1 - len(lines[row]))
            lines[row][column] = (character, style)
            column += 1
    while lines and not lines[-1]:
        lines.pop()
    return lines


def text_of(line: list[Cell]) -> str:
    """Return a line without its styles."""
    return "".join(character for character, _ in line)


def draw(lines: list[list[Cell]], title: str, file: Path) -> None:
    """Draw lines as an SVG of a terminal, in the reader's own fonts."""
    console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for line in lines:
        styled = (
            f"\x1b[{style}m{''.join(c for c, _ in run)}\x1b[0m" if style else "".join(c for c, _ in run)
            for style, run in groupby(line, key=lambda cell: cell[1])
        )
        console.print(Text.from_ansi("".join(styled)), no_wrap=True, overflow="crop", crop=True)
    console.print()  # the last line of a picture is cut at its bottom
    svg = console.export_svg(title=f"python -m {title}", unique_id=file.stem, theme=THEME)
    svg = re.sub(r"\s*@font-face \{.*?\}(?=\s)", "", svg, flags=re.S)
    svg = svg.replace("Fira Code, monospace", FONTS).replace("font-family: arial", "font-family: sans-serif")
    file.write_text(svg, encoding="utf-8")
    print(f"{file} {file.stat().st_size / 1000:.0f} kB")


def photograph(page: Path, file: Path, width: int, height: int) -> None:
    """Take a picture of the top of a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    where = [f"--window-size={width},{height}", f"--screenshot={file}", page.as_uri()]
    subprocess.run([browser, *flags, *where], check=True, capture_output=True, timeout=120)
    print(f"{file} {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
