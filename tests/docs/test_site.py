"""The site: it builds without a warning, every page and link of it is there, and so is every setting of conf/."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml

from sftlab.config.comments import comments
from sftlab.config.groups import CONF, flat
from tests.support import REPO

WRITTEN = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True, check=True
).stdout.split()


class Page(HTMLParser):
    """What a page offers (ids), where it leads, and what a browser would fetch for it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.headings = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.headings += tag in ("h1", "h2", "h3")
        self.ids |= {value for key in ("id", "name") if (value := of.get(key))}
        if tag == "a" and of.get("href"):
            self.links.add(str(of["href"]))
        for key in ("src", "href") if tag in ("script", "img", "link", "iframe") else ():
            if of.get(key):
                self.fetched.add(str(of[key]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as a person builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    arguments = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run([sys.executable, *arguments], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Every page of the site."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def hook(name: str) -> ModuleType:
    """Return a hook of the site as a module."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", REPO / "docs" / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_of_docs_is_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    named = {f"{Path(name).stem}.html" for name in WRITTEN if name.startswith("docs/")}
    named |= {"index.html", "slurm.html", "notebook.html", "reference.html", "experiments/peers.html"}
    assert named <= pages[site / "index.html"].links | {"index.html"}
    assert not list(site.rglob("*.py*"))


def test_every_heading_of_a_page_is_one_of_the_site(site: Path, pages: dict[Path, Page]) -> None:
    """A code block that the site reads otherwise than GitHub would swallow what follows it."""
    for name in WRITTEN:
        if name.startswith("docs/"):
            text = re.sub(r"^```.*?^```", "", (REPO / name).read_text(encoding="utf-8"), flags=re.M | re.S)
            assert pages[site / f"{Path(name).stem}.html"].headings == len(re.findall("^#{1,3} ", text, re.M)), name


def test_every_link_and_anchor_of_the_site_is_there(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        for link in page.links | page.fetched:
            if re.match("[a-z]+:", link) or path.name == "404.html":
                continue
            to, _, anchor = unquote(link).partition("#")
            target = (path.parent / to).resolve() if to else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids | {"__top"}):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert wrong == [] and sum(len(page.links) for page in pages.values()) > 1000


def test_a_browser_fetches_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert [link for page in pages.values() for link in page.fetched if re.match("https?:|//", link)] == []
    assert [css for css in site.rglob("*.css") if re.search(r"url\(['\"]?(https?:|//)|@import", css.read_text())] == []


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def test_every_link_works_in_the_repository_too() -> None:
    repository = hook("repository")
    wrong = []
    for name in WRITTEN:
        text = (REPO / name).read_text(encoding="utf-8")
        for to in (found["to"] for found in repository.LINK.finditer(text) if found["to"]):
            if repository.HERE.match(to) and not to.startswith("#"):
                continue
            path, _, anchor = to.partition("#")
            target = (REPO / name).parent / path if path else REPO / name
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if target.suffix == ".md" and anchor else []
            if not target.exists() or (anchor and anchor not in map(slug, headings)):
                wrong.append(f"{name}: {to}")
    assert wrong == []


@pytest.mark.parametrize(
    ("link", "made"),
    [
        ("[SLURM](../slurm/README.md#file-systems)", "[SLURM](slurm.md#file-systems)"),
        ("[its options](../conf/optim/)", "[its options](reference.md#optim)"),
        ("[peers](../experiments/peers/)", "[peers](experiments/peers.md)"),
        ("[the script](../experiments/peers/compare.py)", "the script (`experiments/peers/compare.py`)"),
        ("[data.md](data.md)", "[Your own data](data.md)"),
        ("[`conf/`](../conf/)", "[`conf/`](reference.md)"),
        ("`[a](../b)` [web](https://example.org)", "`[a](../b)` [web](https://example.org)"),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(link: str, made: str) -> None:
    repository = hook("repository")
    assert repository.LINK.sub(lambda found: repository.relinked(found, "a.md", "docs/a.md", ""), link) == made


def test_a_link_to_nothing_is_a_warning_and_a_file_leads_to_the_repository(caplog: pytest.LogCaptureFixture) -> None:
    repository = hook("repository")
    (found,) = repository.LINK.finditer("[x](../LICENSE)")
    assert repository.relinked(found, "a.md", "docs/a.md", "https://example.org/r/").endswith("/r/blob/main/LICENSE)")
    (found,) = repository.LINK.finditer("[x](nowhere.md)")
    repository.relinked(found, "a.md", "docs/a.md", "")
    assert "docs/a.md links to nowhere.md, which is not there" in caplog.text


def test_the_reference_has_every_key_and_comment_of_conf() -> None:
    """Every file of conf/ is read here with PyYAML alone."""
    reference = hook("reference")
    page = reference.page()
    lacking = []
    for file in sorted(CONF.rglob("*.yaml")):
        group = "" if file.parent == CONF else file.parent.name
        if group == "experiment" or file.name == "command.yaml":
            continue
        text = file.read_text(encoding="utf-8")
        body = yaml.safe_load(text) or {}
        body = {key: body[key] for key in body if key not in ("defaults", "hydra", "architecture")}
        keys = {key for key in flat(body) if key != "launcher"}  # launcher=none takes none
        leaves = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
        leaves = {key for key in leaves if not {"_target_", "_partial_"} & set(key.split("."))}
        if group and file.stem != "base":
            lacking += [] if f"| `{group}={file.stem}` |" in page else [f"{group}={file.stem}"]
        if group == "model":
            leaves -= {"name_or_path"}  # a model's id stands in the list of options
        prefix = "" if not group or "@package _global_" in text else f"{group}."
        lacking += [f"{file.stem}: {prefix}{key}" for key in leaves if f"| `{prefix}{key}` |" not in page]
        told = comments(text)
        lacking += [f"{file.stem}: {told[key]}" for key in leaves & set(told) if reference.cell(told[key]) not in page]
    assert lacking == []
    assert "| `trainer.batch_size` | `32` | a whole number of at least 1 |" in page
    assert "| `data.path` | `rajpurkar/squad` | a text |" in page and "One data option: a source of rows" in page


def test_pictures_are_small_and_fetch_nothing_and_the_readme_shows_them() -> None:
    pictures = sorted((REPO / "docs" / "pictures").iterdir())
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert {p.name for p in pictures} == {"console.svg", "preview.svg", "report.png"}
    for picture in pictures:
        assert f"](docs/pictures/{picture.name})" in readme and picture.stat().st_size < 200_000
        if picture.suffix == ".svg":
            text = picture.read_text(encoding="utf-8")
            assert "url(http" not in text and "@font-face" not in text and "/home/" not in text and "/tmp/" not in text


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("10 %\r\x1b[2K20 %\r\x1b[2Kdone\n", ["done"]),
        ("a\r\nlive\x1b[1A\r\x1b[2Kb\n", ["b", "live"]),
        ("\x1b[1;32mgreen\x1b[0m plain", ["green plain"]),
        ("long line\rshort", ["shortline"]),
    ],
)
def test_a_terminal_shows_what_is_left_in_the_end(printed: str, shown: list[str]) -> None:
    pictures = hook("../pictures")
    assert [pictures.text_of(line) for line in pictures.lines_of(printed)] == shown
