"""What a further independent attempt found in models and data of somebody else's: each hole that it opened, closed."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError

from sftlab.common.files import LinkRefused
from sftlab.config.trust import Untrusted
from sftlab.data import template
from sftlab.data.opening import open_source
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.trained_model import resolve
from sftlab.models.foreign import GENERATE, refuse_links_out
from sftlab.models.load import Model
from tests.support import byte_tokenizer, tiny_llama

PRIVATE = "what nobody else may see"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A model's folder, beside a private file."""
    tiny_llama().save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    (tmp_path / "mine.txt").write_text(PRIVATE)
    return tmp_path / "theirs"


READS: dict[str, Callable[[Path], Any]] = {
    "train's tokenizer": lambda folder: Model(str(folder)).load_tokenizer(),
    "a tokenizer of another model": lambda folder: Model("asset://demo/model", tokenizer=str(folder)).load_tokenizer(),
    "train's config": lambda folder: Model(str(folder)).load_config(torch.device("cpu")),
    "train's weights": lambda folder: Model(str(folder)).weight_files(None),  # type: ignore[arg-type]
    "a tokenizer": lambda folder: resolve(str(folder)).load_tokenizer(),
    "a config": lambda folder: resolve(str(folder)).load_config(),
    "a model": lambda folder: resolve(str(folder)).load_model(),
}


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "additional_chat_templates"])
@pytest.mark.parametrize("read", READS)
def test_a_link_out_of_a_model_s_folder_is_not_followed(read: str, name: str, theirs: Path) -> None:
    """A private file would become the chat template of the trained model, and be published with it."""
    (theirs / name).unlink(missing_ok=True)
    mine = theirs.parent / ("mine.txt" if "." in name else "")
    (theirs / name).symlink_to(mine)
    with pytest.raises(LinkRefused, match="out of the model's folder"):
        READS[read](theirs)


def test_links_of_the_hub_s_cache_and_inside_a_folder_are_followed(theirs: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b/snapshots/0f"
    blobs = tmp_path / "models--a--b/blobs"
    cached.parent.mkdir(parents=True)
    theirs.rename(cached)
    blobs.mkdir()
    for i, file in enumerate(sorted(cached.iterdir())):
        shutil.move(file, blobs / str(i))
        file.symlink_to(f"../../blobs/{i}")
    refuse_links_out(cached)
    assert resolve(str(cached)).load_tokenizer().chat_template == byte_tokenizer().chat_template
    (cached / "again.safetensors").symlink_to("model.safetensors")
    refuse_links_out(cached)
    (cached / "chat_template.jinja").unlink(missing_ok=True)
    (cached / "chat_template.jinja").symlink_to("../../../mine.txt")
    with pytest.raises(LinkRefused):
        refuse_links_out(cached)


@pytest.mark.parametrize("key", ["vocab", "init_inputs", "merges", "gguf_file"])
def test_a_tokenizer_s_config_names_no_files(key: str, theirs: Path) -> None:
    """Each line of a private file became a token, which the trained model's folder shows."""
    (theirs / "tokenizer.json").unlink()
    mine = str(theirs.parent / "mine.txt")
    own = {"tokenizer_class": "BertTokenizer", key: [mine] if key == "init_inputs" else mine}
    (theirs / "tokenizer_config.json").write_text(json.dumps(own))
    for read in (READS["train's tokenizer"], READS["a tokenizer"]):
        with pytest.raises(ValueError, match=f"{key}=.* names a file"):
            read(theirs)


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("read", [name for name in READS if "tokenizer" not in name and "weights" not in name])
def test_a_config_of_ten_million_layers_is_refused_at_once(read: str, part: str | None, theirs: Path) -> None:
    """Building it took all memory, long before anybody missed its weights."""
    own = json.loads((theirs / "config.json").read_text())
    inner = own if part is None else own.setdefault(part, {})
    inner["num_hidden_layers"] = 10_000_000
    (theirs / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="num_hidden_layers=1e\\+07 is no model: expected at most 10,000 layers"):
        READS[read](theirs)


def test_weights_that_inflate_are_refused(theirs: Path) -> None:
    (theirs / "model.safetensors").unlink()
    with zipfile.ZipFile(theirs / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"pytorch_model.bin: 'archive/data/0' in it is compressed"):
        READS["a model"](theirs)


def test_code_that_replaces_generate_is_named(theirs: Path) -> None:
    (theirs / GENERATE).parent.mkdir()
    (theirs / GENERATE).write_text("def generate(model, *given, **settings): ...\n")
    with pytest.raises(Untrusted, match=GENERATE):
        resolve(str(theirs)).load_config()


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("{{ 'a' * 10000000000 }}", SecurityError, "too large"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TimeoutError, "longer than"),
    ],
)
def test_a_template_computes_within_measure_where_a_model_answers_too(
    source: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "TEMPLATE_S", 0.3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    loaded = LoadedModel(None, tokenizer, frozenset())  # type: ignore[arg-type]
    for render in (lambda: loaded.encode_chat([{"role": "user", "content": "a"}]), loaded.turn_ends):
        with pytest.raises(error, match=said):
            render()


def points_elsewhere(theirs: Path) -> None:
    state = json.loads((theirs / "state.json").read_text())
    state["_data_files"] = [{"filename": "../mine/data-00000-of-00001.arrow"}]
    (theirs / "state.json").write_text(json.dumps(state))


def has_a_split_elsewhere(theirs: Path) -> None:
    shutil.rmtree(theirs)
    theirs.mkdir()
    (theirs / "dataset_dict.json").write_text(json.dumps({"splits": ["../mine"]}))


def has_a_split_that_points_elsewhere(theirs: Path) -> None:
    shutil.move(theirs, theirs.parent / "train")
    theirs.mkdir()
    shutil.move(theirs.parent / "train", theirs / "train")
    points_elsewhere(theirs / "train")
    (theirs / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))


@pytest.mark.parametrize("how", [points_elsewhere, has_a_split_elsewhere, has_a_split_that_points_elsewhere])
def test_a_saved_dataset_consists_of_files_of_its_own_folder(how: Callable[[Path], None], tmp_path: Path) -> None:
    import datasets

    for name in ("mine", "theirs"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(str(tmp_path / name))
    assert [row["text"] for row in open_source(str(tmp_path / "theirs"), None, list).read_rows(0, 2)] == ["theirs"]  # type: ignore[index]
    how(tmp_path / "theirs")
    with pytest.raises(ValueError, match="lie in its own folder"):
        open_source(str(tmp_path / "theirs"), None, list)
