"""Secrets: what looks like one, so that none is written into a run directory and none is published.

A token belongs in the environment. A token in a config is refused, because the config is written to disk. A token that
strays into a text (a traceback, a diff of the code) is struck out of it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"),
    "an OpenAI or Anthropic key": re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    "an AWS key": re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Weights & Biases or other API key": re.compile(rb"(?i)(?:wandb_|api_?)key[\"'\s:=]+[0-9a-f]{32,}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in a URL": re.compile(rb"\w+://[^\s/:@\"']+:[^\s/@\"']+@"),
}
VARIABLE = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|KEY)$", re.IGNORECASE)
LEAST = 8  # characters: striking out shorter values would strike out ordinary words too
STRUCK = "[secret]"


def refuse(config: Any, path: str = "") -> None:
    """Raise ValueError for a value in a config that is or holds a secret; the message does not repeat it."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            refuse(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            refuse(value, path)
    elif isinstance(config, str):
        for kind in kinds(config):
            raise ValueError(
                f"{path} holds {kind}, and what is set here is written into the run's directory. Put it into the "
                "environment instead (HF_TOKEN, a login of the service's own, or ~/.netrc)"
            )


def kinds(text: str) -> Iterator[str]:
    """Yield what kinds of secrets a text holds."""
    for name, value in own():
        if value in text:
            yield f"the value of {name}"
    for kind, pattern in SECRETS.items():
        if pattern.search(text.encode()):
            yield kind


def strike(text: str) -> str:
    """Return a text with the secrets in it struck out."""
    for _, value in own():
        text = text.replace(value, STRUCK)
    content = text.encode()
    for pattern in SECRETS.values():
        content = pattern.sub(STRUCK.encode(), content)
    return content.decode()


def own() -> list[tuple[str, str]]:
    """Return the values of environment variables whose names say that they are secret."""
    return [(name, value) for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= LEAST]
