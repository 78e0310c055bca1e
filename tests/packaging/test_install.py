"""`conf/` and the shipped assets are found from a wheel, from an editable install and from a bare checkout."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftlab.__main__ import COMMANDS
from tests.support import REPO

GROUPS = ("model", "peft", "data", "optim", "schedule", "parallel", "launcher", "tracker", "experiment", "sweeper")
PROBE = """
import contextlib, io, json, runpy, sys
said = []
for typed in json.loads(sys.argv.pop()):  # each as `python -m sftlab.train ...` does it
    sys.argv[1:] = typed
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module("sftlab.train", run_name="__main__", alter_sys=True)
    said.append(out.getvalue())
import sftlab, sftlab.config.groups, hydra_plugins.sftlab_launcher.launcher as launcher
from sftlab.assets import FOLDER
names = {"package": sftlab.__file__, "conf": sftlab.config.groups.CONF, "plugin": launcher.__file__, "assets": FOLDER}
print(json.dumps([{name: str(path) for name, path in names.items()}, *said]))
"""


def python(
    *arguments: object, cwd: Path, path: Path | None = None, interpreter: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with `path` as the only PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [str(interpreter), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def backend() -> list[str]:
    """Where the build backend and what the project needs lie: a new environment takes them from here."""
    for name in ("build", "hatchling", "editables"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (it is in the extra dev), and a build without a network needs it")
    return [
        p for p in sys.path if p and Path(p).is_dir() and Path(p) != REPO and not Path(p, "sftlab/train.py").exists()
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this project, in a folder of its own: a file that was never added is missing there."""
    folder = tmp_path_factory.mktemp("checkout") / "sftlab"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, backend: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    path = Path(os.pathsep.join(backend))
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, checkout, cwd=out, path=path)
    (made,) = out.glob("*.whl")
    return made


def check(
    cwd: Path, root: Path, conf: Path, path: Path | None = None, interpreter: str | Path = sys.executable
) -> dict[str, Any]:
    """See that the code, conf/ and the assets under `root` are those used, and that they are all there; return the
    config of `train` without arguments."""
    job = ("--cfg", "job")
    typed = [job, ("experiment=llama3_2_1b_squad", "launcher=local", "optim.lr=2e-5", *job), ("--help",)]
    done = python("-c", PROBE, json.dumps(typed), cwd=cwd, path=path, interpreter=interpreter)
    found, plain, experiment, told = json.loads(done.stdout)
    assert Path(found["package"]) == root / "sftlab/__init__.py" and Path(found["conf"]) == conf
    assert Path(found["plugin"]).is_relative_to(root) and Path(found["assets"]) == root / "sftlab/assets"
    for name in (
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "train.jsonl.gz",
        "validation.jsonl",
    ):
        assert (root / "sftlab/assets/demo" / name).stat().st_size > 100
    theirs = {str(p.relative_to(conf)) for p in conf.rglob("*.yaml")}
    assert theirs == {str(p.relative_to(REPO / "conf")) for p in (REPO / "conf").rglob("*.yaml")}

    config: dict[str, Any] = yaml.safe_load(plain)
    assert config["trainer"]["batch_size"] == 32 and config["model"]["name_or_path"].startswith("asset://")
    shown = yaml.safe_load(experiment)
    assert shown["optim"]["lr"] == 2e-5 and shown["model"]["name_or_path"] == "meta-llama/Llama-3.2-1B"
    assert all(f"{group}: " in told for group in GROUPS)
    return config


def test_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    python(*install, cwd=empty)
    check(empty, site, site / "sftlab/conf", path=site)
    command = site / "bin" / "sftlab"
    told = python(command, "--help", cwd=empty, path=site).stdout
    assert all(f"\n  {name} " in told for name in COMMANDS)
    assert "batch_size: 32" in python(command, "train", "--cfg", "job", cwd=empty, path=site).stdout
    assert list(empty.iterdir()) == []
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"sftlab", "hydra_plugins"}, "and nothing beside them"
    assert any(name.endswith("licenses/LICENSE") for name in names) and "sftlab/config/foreign.yaml" in names
    assert sum(zipfile.ZipFile(wheel).getinfo(name).file_size for name in names) < 8 << 20


def test_an_editable_install(checkout: Path, backend: list[str], tmp_path: Path) -> None:
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    python("-m", "venv", "--without-pip", venv, cwd=empty)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "surroundings.pth").write_text("\n".join(p for p in backend if "site-packages" in p or "python" not in p))
    interpreter = venv / "bin/python"
    install = ("-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index")
    python(*install, "--no-build-isolation", "--editable", checkout, cwd=empty)
    edited = checkout / "conf/optim/adamw.yaml"
    before = edited.read_text()
    edited.write_text(before + "weight_decay: 0.5\n" if "weight_decay" not in before else before.replace("0.01", "0.5"))
    try:
        shown = check(empty, checkout, checkout / "conf", interpreter=interpreter)
        assert shown["optim"]["weight_decay"] == 0.5, "an edit of conf/ counts at once"
    finally:
        edited.write_text(before)
    assert list(empty.iterdir()) == []


def test_a_bare_checkout(checkout: Path) -> None:
    check(checkout, checkout, checkout / "conf")
