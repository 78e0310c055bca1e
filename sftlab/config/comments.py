"""The comments of a YAML file by the keys that they stand at: at the end of a key's line, under it, or above it."""

import re
from collections.abc import Iterator

KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w.@/]+):(?P<rest>.*)$")
ITEM = re.compile(r"^ *- .*?\s#\s(.*)$")
OPEN = re.compile(r'^ *[\w.@/]+: *"(?:[^"\\]|\\.)*$')  # a quoted text that goes on in the next line
COMMENT = re.compile(r"^\s*#\s?(?P<text>.*)$")


def comments(text: str) -> dict[str, str]:
    """Return the comment of each dotted key of a YAML file; that of the file, before its first key, is at "".

    A comment on lines of its own belongs to the key under it; where it is indented deeper than that key, or no key
    follows, to the one above. Block texts (`|-`) hold no comments.
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    waiting: list[tuple[int, str]] = []
    last = ""
    for line in lines(text):
        comment, key = COMMENT.match(line), KEY.match(line)
        if comment:
            waiting.append((len(line) - len(line.lstrip()), comment["text"]))
            continue
        if key is None:
            item = ITEM.match(line)
            add(found, last, [item[1]] if item else [])
            continue
        indent = len(key["indent"])
        above = [words for at, words in waiting if at > indent and last]
        own = [words for at, words in waiting if not (at > indent and last)]
        add(found, last, above)
        path = [(at, name) for at, name in path if at < indent]
        path.append((indent, key["key"]))
        if not last and own:  # before the first key: of the whole file
            add(found, "", own)
            own = []
        last = ".".join(name for _, name in path)
        trailing = re.search(r"(?:^|\s)#\s(.*)$", key["rest"])
        add(found, last, [*own, *([trailing[1]] if trailing else [])])
        waiting = []
    add(found, last, [words for _, words in waiting])
    return found


def lines(text: str) -> Iterator[str]:
    """Yield the lines of a YAML text that are no part of a block text or of a quoted text over several lines."""
    block: int | None = None
    quoted = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and (not line.strip() or indent > block):
            continue
        block = None
        if quoted:
            quoted = not line.rstrip().endswith('"')
            continue
        if re.search(r":\s*[|>][-+]?\s*$", line):
            block = indent
        elif OPEN.match(line):
            quoted = True
        yield line


def add(found: dict[str, str], key: str, words: list[str]) -> None:
    """Add lines to the comment of a key."""
    kept = [word for word in words if word and not word.startswith("@package")]
    if kept:
        found[key] = "\n".join(filter(None, [found.get(key, ""), *kept]))
