"""Secrets: what looks like one, so that none is written into a run directory and none is published.

A token belongs in the environment. A token in a config is refused, because the config is written to disk. A token that
strays into a text (a traceback, a diff of the code) is struck out of it. Values are struck before they are written as
JSON or YAML, never keys or finished text: what is written can always be read again.

The patterns follow the rules of gitleaks (https://github.com/gitleaks/gitleaks, config/gitleaks.toml), detect-secrets
(https://github.com/Yelp/detect-secrets, plugins/) and the services' own descriptions of their tokens.
"""

import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

QUERY = r"(?:access_?|auth_?|api_?|id_|refresh_|private_|secret_)?(?:token|key|secret|password|passwd|signature|sig)"
NAMED = r"(?:api[-_]?key|apikey|secret[-_]?key|access[-_]?(?:token|key)|auth[-_]?token|client[-_]?secret|passw(?:or)?d)"
VALUE = r"[^\s\"',;{}()\[\]$<]"  # no code: what calls or looks up a value is not the value
RULES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})",
    "a GitLab token": r"\bgl(?:pat|dt|rt|oas|cbt|ptt|ft|imt|agent|soat|ffct)-[\w-]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:proj-|ant-|svcacct-|admin-)?(?=[\w-]{0,99}?[A-Za-z0-9]{16})[\w-]{32,}",
    "an AWS key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b",
    "a signed URL": r"(?i)[?&;](?:X-Amz-(?:Signature|Security-Token|Credential)|X-Goog-Signature|sig|signature)="
    r"[\w%+/=~.-]{16,}",
    "a token in a URL": rf"(?i)[?&;#]{QUERY}=(?=[^&\s]{{0,99}}\d)[\w%+/=~.-]{{12,}}",
    "a Google key": r"\bAIza[\w-]{35}(?![\w-])|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{28}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}|\bxapp-\d-[\w-]{10,}|"
    r"hooks\.slack\.com/(?:services|workflows)/[\w/-]{20,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a PyPI token": r"\bpypi-AgE[\w-]{50,}",
    "a JSON web token": r"(?<![\w-])ey[A-Za-z0-9_-]{10,4000}\.ey[A-Za-z0-9_-]{10,}\.[\w-]{10,}",
    "an authorisation header": r"(?i)\b(?:bearer|basic)\s+(?=[\w.~+/-]{0,99}\d)[\w.~+/-]{20,}=*",
    "a Weights & Biases or other API key": r"\bwandb_v\d+_[A-Za-z0-9_]{20,}|"
    r"(?i:(?:wandb_|api_?)key[\"'\s:=]+[0-9a-f]{32,}\b|\bwandb[\w.-]{0,20}[\"'\s:=]{1,4}[0-9a-f]{40}\b)",
    "a named secret": rf"(?i:{NAMED})[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?(?={VALUE}{{0,99}}\d)"
    rf"(?:(?={VALUE}{{0,99}}[A-Z])(?={VALUE}{{0,99}}[a-z]){VALUE}{{12,}}|{VALUE}{{32,}})",
    "a private key": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\sA-Za-z0-9+/=:,.]{0,20000}-----END [A-Z ]{0,40}-----)?",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@\"'<>]{0,99}:[^\s/@\"'<>]{3,}@(?=[\w\[])",
    "a token as the user of a URL": r"\bhttps?://(?=[^\s/:@]{0,99}\d)[A-Za-z0-9_-]{20,}@(?=\w)",
    "a Stripe key": r"\b[rs]k_(?:test|live|prod)_[A-Za-z0-9]{10,}",
    "a SendGrid, DigitalOcean or Replicate key": r"\bSG\.[\w-]{20,24}\.[\w-]{39,50}|"
    r"\bdo[opr]_v1_[a-f0-9]{64}|\br8_\w{37}\b",
    "a Groq, xAI or Databricks key": r"\bgsk_\w{40,}|\bxai-\w{60,}|\bdapi[a-f0-9]{32}\b",
    "an NVIDIA, Perplexity, LangSmith, Langfuse, Pinecone, Together, RunPod or Kaggle key": r"\bnvapi-[\w-]{40,}|"
    r"\bpplx-[A-Za-z0-9]{40,}|\blsv2_(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{8,}|\bsk-lf-[a-f0-9]{8}-[a-f0-9-]{27}|"
    r"\bpcsk_[A-Za-z0-9]{4,8}_[A-Za-z0-9]{40,}|\btgp_v1_[\w-]{40,}|\brpa_[A-Za-z0-9]{30,}|\bKGAT_[a-f0-9]{32}",
    "a Docker, Vault, Terraform, Grafana, Sentry or age key": r"\bdckr_(?:pat|oat)_[\w-]{20,}|\bhv[sb]\.[\w-]{24,}|"
    r"\.atlasv1\.[\w-]{60,}|\bgl(?:c_[A-Za-z0-9+/]{32,}|sa_[A-Za-z0-9]{32}_[a-f0-9]{8})|\bsntry[su]_[\w+/=-]{40,}|"
    r"\bAGE-SECRET-KEY-1[A-Z0-9]{58}",
    "an Atlassian, Notion, Linear, Figma, Airtable, Postman, Shopify or Telegram key": r"\bAT(?:ATT3|BB)[\w-]{24,}|"
    r"\bntn_[A-Za-z0-9]{40,}|\blin_api_[A-Za-z0-9]{40}|\bfigd_[\w-]{36,}|\bpat[A-Za-z0-9]{14}\.[a-f0-9]{64}|"
    r"\bPMAK-[a-f0-9]{24}-[a-f0-9]{34}|\bshp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|\b\d{8,10}:AA[\w-]{33}(?![\w-])",
    "an Azure account key": r"(?i)\bAccountKey=[\w+/]{40,}=*|\bSharedAccessSignature=[\w%&=+/.-]{20,}",
}
SECRETS = {kind: re.compile(pattern.encode()) for kind, pattern in RULES.items()}
# Names of environment variables whose values are secret. Of those that may hold a plain setting too, only a value that
# looks random counts (see `looks_random`): SORT_KEY=learning_rate is no secret.
VARIABLE = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|PW|PAT|KEY|AUTH|API_?KEY|CREDENTIALS?|JWT|DSN|CONNECTION_STRING|"
    r"COOKIE|NETRC|WEBHOOK(_URL)?)$|APIKEY$|(TOKEN|SECRET|PASSWORD|BINDPW)$|_(TOKEN|SECRET|PASSWORD|KEY)_(ID|B64|BASE64)$|"
    r"^(DATABASE|REDIS|MONGO(DB)?|POSTGRES(QL)?|MYSQL|AMQP|BROKER|SENTRY)(_?(URL|URI|DSN))$|^(HTTPS?|ALL|FTP)_PROXY$",
    re.IGNORECASE,
)
SURE = re.compile(r"TOKEN|SECRET|PASS|PWD|(^|_)PAT$|JWT|CREDENTIAL", re.IGNORECASE)
URL = re.compile(r"_PROXY$|URL$|URI$|DSN$", re.IGNORECASE)
# These also match ordinary text, so they are not looked for in a vocabulary.
LOOSE = ("a named secret", "an authorisation header", "a token in a URL", "a signed URL", "a password in a URL")
LEAST = 8  # characters: striking out shorter values would strike out ordinary words too
STRUCK = "[secret]"


def refuse(config: Any, path: str = "") -> None:
    """Raise ValueError for a value in a config that is or holds a secret; the message does not repeat it."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            for kind in kinds(str(key)):
                raise holds(kind, f"a key of {path or 'the config'}")
            refuse(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            refuse(value, path)
    elif isinstance(config, str):
        for kind in kinds(config):
            raise holds(kind, path)


def refuse_overrides(overrides: Sequence[str]) -> None:
    """Raise ValueError for words of a command line that hold a secret, before anything is written. Not repeated."""
    for override in overrides:
        key = override.partition("=")[0]
        for kind in kinds(override):
            raise holds(kind, strike(key) if "=" in override else "the command line")


def holds(kind: str, where: str) -> ValueError:
    """Return the error for a secret where none may be."""
    return ValueError(
        f"{where} holds {kind}, and what is set here is written into the run's directory. Put it into the "
        "environment instead (HF_TOKEN, a login of the service's own, or ~/.netrc)"
    )


def kinds(text: str) -> Iterator[str]:
    """Yield what kinds of secrets a text holds."""
    for name, value in own():
        if value in text:
            yield f"the value of {name}"
    yield from patterns_in(text.encode(errors="surrogatepass"))


def patterns_in(content: bytes, loose: bool = True) -> Iterator[str]:
    """Yield the kinds of secrets that patterns find in a content, whoever they belong to."""
    for kind, pattern in SECRETS.items():
        if (loose or kind not in LOOSE) and pattern.search(content):
            yield kind


def strike(text: str) -> str:
    """Return a text with the secrets in it struck out. For what is written as JSON or YAML use `strike_values`."""
    for _, value in own():
        text = text.replace(value, STRUCK)
    content = text.encode(errors="surrogatepass")
    for pattern in SECRETS.values():
        content = pattern.sub(STRUCK.encode(), content)
    return content.decode(errors="surrogatepass")


def strike_values(node: Any) -> Any:
    """Return a tree with the secrets in its texts struck out; its keys, numbers and shape stay."""
    if isinstance(node, Mapping):
        return {key: strike_values(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [strike_values(value) for value in node]
    return strike(node) if isinstance(node, str) else node


def own() -> list[tuple[str, str]]:
    """Return the values of environment variables whose names say that they are secret, the longest first."""
    found = [(name, value) for name, value in os.environ.items() if is_secret_name(name)]
    secret = [(name, part) for name, value in found if (part := secret_part(name, value)) and len(part) >= LEAST]
    return sorted(secret, key=lambda pair: -len(pair[1]))


@functools.cache
def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name may hold a secret."""
    return VARIABLE.search(name) is not None


@functools.lru_cache(maxsize=256)
def secret_part(name: str, value: str) -> str:
    """Return what is secret in the value of a variable of this name; nothing where it holds a plain setting."""
    if URL.search(name):
        found = re.match(r"\w[\w+.-]*://([^\s/@]*)@", value)  # without user and password it is an address
        return "" if not found or ":" not in found[1] else found[1]
    if os.path.isabs(value) and SURE.search(name) and not re.search(r"PASS|SECRET", name, re.IGNORECASE):
        return ""  # GOOGLE_CREDENTIALS=/home/ada/key.json, MY_PWD=/home/ada: a place
    if re.fullmatch(r"<[^<>]*>", value):
        return ""  # EOS_TOKEN=<|end_of_text|>
    return value if SURE.search(name) or looks_random(value) else ""


def looks_random(value: str) -> bool:
    """Return whether a value looks drawn at random. Words joined by hyphens and the like are not: us-east-1.

    The longer parts of a plain setting are words, at least half of all are, and it is no single run of letters and
    digits. (detect-secrets judges by entropy, which cannot tell `learning_rate` from a short password.)
    """
    parts = [part for part in re.split(r"[-_./ :,]+", value) if part]
    words = [part for part in parts if part.isalpha()]
    plain = all(part.isalpha() or len(part) <= 4 for part in parts) and 2 * len(words) >= len(parts)
    return not plain and not re.fullmatch(r"[\d.,:-]+", value)


class Striking:
    """A text stream that strikes secrets from what is written to it, and writes the rest to `stream`."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        self.stream.write(strike(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def strike_output() -> None:
    """Strike secrets out of what this process prints from here on: its output becomes the log of a rank."""
    if not isinstance(sys.stdout, Striking):
        sys.stdout, sys.stderr = Striking(sys.stdout), Striking(sys.stderr)
