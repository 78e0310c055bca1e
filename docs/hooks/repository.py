"""Pages of the site that lie outside docs/, and links as they work in the repository turned into the site's.

Every page is written for the repository: a link names a file beside it. Here a link to a page of the site becomes one
within the site. A link to any other file leads to the repository if mkdocs.yml has `repo_url`, else it is plain text.
"""

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
log = logging.getLogger("mkdocs.hooks.repository")

# Code in fences and in backticks is matched first, so that nothing in it is taken for a link.
LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)\)", re.M | re.S
)
INFO = re.compile(r"^```(\w+) .*$", re.M)  # words after a block's language are for tests, and no fence to the site
HERE = re.compile(r"[a-z]+:|#|/")  # links that stay: to the web, or within a page
FENCE = "```"


def pages() -> dict[str, str]:
    """Return the site's pages that lie outside docs/, each with the file that it is made of."""
    made = {"index.md": "README.md", "slurm.md": "slurm/README.md", "notebook.md": "docs/notebook.ipynb"}
    made |= {f"{name.lower()}.md": f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
    made["experiments/index.md"] = ""
    for readme in sorted((REPO / "experiments").glob("*/README.md")):
        made[f"experiments/{readme.parent.name}.md"] = readme.relative_to(REPO).as_posix()
    return made


def on_config(config: Any) -> Any:
    """Put every experiment into the navigation."""
    config.nav.append({"Experiments": [name for name in pages() if name.startswith("experiments/")]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/, and the pictures that they show."""
    for name, source in pages().items():
        files.append(File.generated(config, name, content=content(source)))
    for picture in sorted((REPO / "experiments").glob("*/*.svg")):
        files.append(File.generated(config, picture.relative_to(REPO).as_posix(), abs_src_path=str(picture)))
    return files


def content(source: str) -> str:
    """Return a page's Markdown: a file's as it is, a notebook's cells in their order, or the list of experiments."""
    if not source:
        return experiments()
    text = (REPO / source).read_text(encoding="utf-8")
    if not source.endswith(".ipynb"):
        return text
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return "\n\n".join(body if kind == "markdown" else f"{FENCE}python\n{body}\n{FENCE}" for kind, body in cells)


def experiments() -> str:
    """Return the page that lists the experiments by their questions."""
    lines = ["# Experiments", "", "One folder a question, with its command, numbers, versions, commit and verdict.", ""]
    for name, source in pages().items():
        if name.startswith("experiments/") and source:
            title = (REPO / source).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"- [{title}]({posixpath.basename(source[: -len('/README.md')])}.md)")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links and the code blocks of a page into the site's."""
    at = page.file.src_uri
    markdown = INFO.sub(rf"{FENCE}\1", markdown)
    source = pages().get(at, f"docs/{at}")
    if not source or at == "reference.md":
        return markdown
    return LINK.sub(lambda found: relinked(found, at, source, str(config.repo_url or "")), markdown)


def relinked(found: re.Match[str], at: str, source: str, repo_url: str) -> str:
    """Return a link of the page at `at`, which is made of the file `source`, as the site has it."""
    to = found["to"]
    if to is None or HERE.match(to):
        return found[0]
    path, _, anchor = to.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (REPO / path).exists():
        log.warning("%s links to %s, which is not there", source, to)
        return found[0]
    target = target_of(path)
    if target is not None:
        page, _, own = target.partition("#")
        anchor = anchor or own
        where = posixpath.relpath(page, posixpath.dirname(at) or ".") + (f"#{anchor}" if anchor else "")
        text = found["text"]
        if text in (to, posixpath.basename(to)) and path.endswith(".md"):  # a file's name is no title
            text = (REPO / path).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        return f"{found['image']}[{text}]({where})"
    if repo_url:
        return f"{found['image']}[{found['text']}]({repo_url.rstrip('/')}/blob/main/{path})"
    text = found["text"].strip("`")
    return f"`{text}`" if text.rstrip("/") in (path, to.rstrip("/")) else f"{found['text']} (`{path}`)"


def target_of(path: str) -> str | None:
    """Return the site's page for a file or folder of the repository: conf/ is the reference, a folder its README."""
    if path == "conf" or path.startswith("conf/"):
        group = path.split("/")[1:2]
        return f"reference.md#{group[0]}" if group and (REPO / "conf" / group[0]).is_dir() else "reference.md"
    if path == "experiments":
        return "experiments/index.md"
    if (REPO / path).is_dir():
        path = f"{path}/README.md"
    found = {source: name for name, source in pages().items() if source}.get(path)
    if found is None and path.startswith("docs/") and (REPO / path).is_file() and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if found is None and path.startswith("experiments/") and path.endswith(".svg"):
        return path
    return found
