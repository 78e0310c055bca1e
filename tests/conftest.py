"""Fixtures for every test: an own cache, a tiny model, small data, a world of one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes of two threads each on two cores are 10 times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts `make test &` with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup does the same with SIGHUP

from tests.commands import demo_run, hub, listening_run, refused, rye_run, shapes, typed  # noqa: E402, F401  fixtures


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised examples of the tests lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    return folder


@pytest.fixture(autouse=True)
def own_data() -> Iterator[None]:
    """The option data=own, which `evaluate` offers of its run, is gone after the test that ran it."""
    yield
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().repo.get("data", {}).pop("own.yaml", None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    from tests.support import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def squad_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and validation files in SQuAD's schema."""
    from tests.support import make_squad_file

    folder = tmp_path_factory.mktemp("squad")
    return make_squad_file(folder / "train.jsonl"), make_squad_file(folder / "validation.jsonl", 4, seed=1)


@pytest.fixture(scope="module")
def one() -> Iterator[object]:
    """A world of one, joined once for a module and left after it: some tests run a whole command in this process."""
    from sftlab.parallel.world import world

    with world() as here:
        yield here
