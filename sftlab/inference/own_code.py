"""The refusal of what a model's folder brings from elsewhere, and of its Python code without the user's word."""

import logging
from pathlib import Path

from sftlab.config.trust import Untrusted
from sftlab.models.foreign import own_code, refuse_foreign_parts

log = logging.getLogger(__name__)


def refuse_own_code(folder: Path, named: str, trust: bool) -> None:
    """Raise Untrusted if a model's folder brings Python code that would run; with `trust`, say what will run.

    Raises: ValueError or LinkRefused if it takes in files that lie elsewhere.
    """
    refuse_foreign_parts(folder)
    brought = own_code(folder)
    if brought and not trust:
        raise Untrusted(
            f"{named}: the model in {folder} brings code of its own, which would run on this machine: "
            f"{', '.join(brought)}. model.trust_remote_code in the run's config counts for nothing here: read "
            "the code, then trust=true allows it"
        )
    if brought:
        log.warning("trust=true: code from %s will run on this machine: %s", folder, ", ".join(brought))
