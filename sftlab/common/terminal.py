"""The terminal: rich's console, on which a text is shown and never obeyed, wherever it comes from.

An answer of a model, a name in somebody's config or an error in a log may hold escape sequences, which would set a
terminal's title or its clipboard, and rich's own markup.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sftlab.common.words import plain


class Terminal(Console):
    """rich's console without markup and emoji codes in texts, and without control characters that are not its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **settings})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, their texts plain."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
