"""A page in one file that needs no network: its figures as JSON, and the scripts that draw them.

style.css and charts.js are shared by all pages. A page has its own HTML (sections without content) and script. Its
scripts put every text into the page as text, and its Content-Security-Policy forbids every request.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftlab.common.secrets import strike_values

SHARED = Path(__file__).parent


def page(html: Path, scripts: Sequence[Path], found: dict[str, Any]) -> str:
    """Return a page with its style, its scripts and its data in it. Secrets in the data are struck."""
    # only "<" could end a script element early, and JSON may write it as an escape
    figures = json.dumps(strike_values(found), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "STYLE": (SHARED / "style.css").read_text(encoding="utf-8"),
        "CHARTS": (SHARED / "charts.js").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join(script.read_text(encoding="utf-8") for script in scripts),
        "DATA": figures,
    }
    text = html.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part, 1)
    return text
