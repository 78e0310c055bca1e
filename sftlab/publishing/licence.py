"""The licence: a fine-tuned model inherits that of its base. If it is unknown, the card says so; nothing is guessed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.assets import SCHEME, locate
from sftlab.common.words import markdown_code, markdown_text


@dataclass(frozen=True)
class Licence:
    """A licence in the form of a card's metadata, and a sentence on where it comes from."""

    id: str | None
    sentence: str
    name: str | None = None
    link: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The entries for the card's head; none if no licence is known."""
        found = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def licence_of(base: str, given: str | None, random: bool, network: bool) -> Licence:
    """Return the licence of a model trained from `base`: the one given, or else the base's own.

    With `random` the model was trained from random weights and inherits nothing. `network` allows reading a hub card.
    """
    if given:
        return Licence(given, f"`{given}`, as the publisher states.")
    if random:
        return Licence(None, "Not stated. The model was trained from random weights, so none is inherited.")
    if base.startswith(SCHEME):
        return Licence("apache-2.0", "`apache-2.0`, inherited from the base model, which ships with sftlab.")
    folder = Path(locate(base))
    data = from_folder(folder) if folder.is_dir() else from_hub(base) if network else None
    if data is None or not data.get("license"):
        why = "" if folder.is_dir() or network else " (it was not asked: this is a dry run)"
        return Licence(None, f"Not known: no licence could be read from the base model's card{why}. Its terms apply.")
    found = str(data["license"])
    named = f" ({markdown_text(data['license_name'])})" if data.get("license_name") else ""
    return Licence(
        found,
        f"{markdown_code(found)}{named}, inherited from the base model. Its terms apply to this model too.",
        data.get("license_name"),
        data.get("license_link"),
    )


def from_folder(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a local model's card; None if it has none."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    return dict(ModelCard.load(card).data.to_dict()) if card.is_file() else None


def from_hub(base: str) -> dict[str, Any] | None:
    """Return the metadata of a hub model's card; None if it has none or cannot be reached."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard.load(base).data.to_dict())
    except Exception:
        return None  # the card then says that the licence is not known
