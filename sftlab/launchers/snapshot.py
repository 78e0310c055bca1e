"""The code that jobs run: copied at submission, so that later edits do not change a submitted job.

The copy holds the package, its conf/, and every package outside of the environment that a `_target_` names. git.json in
it holds the commit and the diff against it; the environment.json of a run repeats them.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftlab.common import run_directory
from sftlab.common.files import plain_files, refuse_links, remove

PACKAGE = Path(__file__).parents[1]
SKIPPED = ("__pycache__", ".git", ".venv", "node_modules", "sweeps", "runs")


def snapshot(sweep_dir: Path, configs: Iterable[Mapping[str, Any]], cwd: Path) -> Path:
    """Return the folder that holds a copy of the code: the newest one if nothing has changed since, else a new one.

    Running jobs still import from their copy, so a copy is never changed: code, code.2, code.3, ...
    """
    sources = {"sftlab": PACKAGE} | own_packages(configs, cwd)
    conf = next((p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()), None)
    if conf is not None and conf.parent != PACKAGE:
        sources["conf"] = conf
    contents = {
        f"{name}/{f.relative_to(source)}" if source.is_dir() else source.name: f
        for name, source in sources.items()
        for f in files(source)
    }
    digest = digest_of(contents)
    copies = sorted(sweep_dir.glob("code*"), key=lambda p: (len(p.name), p.name))
    if copies and digest_of_copy(copies[-1]) == digest:
        for cache in copies[-1].rglob("__pycache__"):  # Python would run what is in it instead of the source
            remove(cache)
        return copies[-1].absolute()
    target = sweep_dir / (f"code.{len(copies) + 1}" if copies else "code")
    partial = sweep_dir / f".{target.name}.partial"
    remove(partial)
    for name, file in contents.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial / name)
    (partial / run_directory.GIT).write_text(json.dumps(run_directory.commit() | {"digest": digest}, indent=1))
    partial.rename(target)
    return target.absolute()


def digest_of(contents: Mapping[str, Path]) -> str:
    """Return a hash of files' names and contents."""
    digest = hashlib.sha256()
    for name, file in sorted(contents.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def digest_of_copy(copy: Path) -> str:
    """Return the hash of a copy as it is now. What its git.json says is not believed: jobs would run what is there.

    A file too many changes the hash, because Python would find it; a link makes it empty. Python's caches are left out.
    """
    try:
        refuse_links(copy.parent, copy.name)
        names = [n for n in plain_files(copy) if n != run_directory.GIT and "__pycache__" not in n.split("/")]
    except OSError:
        return ""
    return digest_of({n: copy / n for n in names})


def own_packages(configs: Iterable[Mapping[str, Any]], cwd: Path) -> dict[str, Path]:
    """Return {name: folder or file} of the packages that targets name, without those installed in the environment."""
    names = {target.split(".")[0] for config in configs for target in targets(config)} - {"sftlab"}
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    installed += [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]  # of a base Python
    found = {}
    for name in sorted(names):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin and spec.has_location else None
        if origin is None and spec and spec.submodule_search_locations:
            origin = Path(next(iter(spec.submodule_search_locations))) / "__init__.py"
        if origin is not None and not any(origin.is_relative_to(place) for place in installed):
            found[name] = origin.parent if origin.name == "__init__.py" else origin
    return found


def targets(node: Any) -> Iterator[str]:
    """Yield every `_target_` in a config."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from targets(value)


def files(source: Path) -> Iterator[Path]:
    """Yield the files of a package, without caches and hidden folders."""
    if source.is_file():
        yield source
        return
    for path in sorted(source.iterdir()):
        if path.name in SKIPPED or path.name.startswith(".") or path.suffix == ".pyc":
            continue
        yield from files(path)
