"""What every command shares: where conf/ lies, free text on the command line, errors that teach, exit codes.

Imports hydra and nothing heavy, so that `--help` and `--cfg job` answer at once.
"""

import difflib
import functools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sftlab import completion, secret

PACKAGE = Path(__file__).parent
CONF = next(
    p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()
)  # a wheel has it inside, a checkout beside

# Errors whose message says what to do; a traceback would only hide it. SFTLAB_TRACEBACK=1 shows it all the same.
TAUGHT = (ValueError, OSError, ArithmeticError, MemoryError)
FREE_TEXT = re.compile(
    r"^(\+{0,2})((?:\S*\.)?(?:\w*path|\w*dir|vllm_python|run|resume|tokenizer|prompts|output|file))=(.*)$", re.DOTALL
)
LITERAL = re.compile(r"^(prompt|system|fields\.\w+)=(.*)$", re.DOTALL)
GIVEN: dict[str, str] = {}  # texts of the command line that no parser may touch, by key
START_TIME = "SFTLAB_START_TIME"
SWEEPING = r"\+?(launcher=(?!none$).*|sweeper=(?!grid$).*)"  # options that make a command a sweep without -m


def main(task: Callable[[Any], float | None], config_name: str) -> None:
    """Run `task` on the config composed from `config_name` and the command line; exit 0, or 1 with the error shown.

    Hydra's own handler drops the traceback of a failed job and every suggestion, so errors are taken from it raw.
    """
    multirun = any(a in ("-m", "--multirun") or re.fullmatch(SWEEPING, a) for a in sys.argv[1:])
    sys.argv[1:] = [quote(a, multirun) for a in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    OmegaConf.register_new_resolver("inside", inside, replace=True)
    OmegaConf.register_new_resolver("given", GIVEN.__getitem__, replace=True)
    script = completion.prepare(sys.argv[1:], as_module=sys.argv[0].endswith(".py"))
    if script:
        print(script)
        return
    try:
        agree_on_start_time(multirun)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(past_hydra(task))()
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except Failed as failed:
        complain(explain(failed.error, config_name))
        sys.exit(1)
    except Exception as error:
        complain(explain(error, config_name))
        sys.exit(1)


class Failed(BaseException):
    """Carries a single run's error past Hydra, which for an Exception prints a line of its own before ours."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def past_hydra(task: Callable[[Any], float | None]) -> Callable[[Any], float | None]:
    """Return `task` with its errors carried past Hydra; in a sweep Hydra gets them, since its other points go on."""

    @functools.wraps(task)
    def run(cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            return task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.RUN:
                raise Failed(error) from error
            raise

    return run


def quote(argument: str, multirun: bool) -> str:
    """Quote the value of a free-text or path override, so that Hydra takes commas, brackets and the like as they stand.

    In a multirun a path that does not exist is left to the grammar: `data.path=a.jsonl,b.jsonl` is a sweep.
    A prompt may hold anything, quotes and `${...}` too: it goes around Hydra, which gets a reference to it.
    """
    literal = LITERAL.match(argument)
    if literal:
        key, text = literal.groups()
        GIVEN[key] = text
        return f"{'+' if key.startswith('fields.') else ''}{key}='${{given:{key}}}'"
    match = FREE_TEXT.match(argument)
    if not match:
        return argument
    plus, key, value = match.groups()
    if value in ("", "null") or value[0] + value[-1] in ("''", '""') or "${" in value:
        return argument
    if multirun and not Path(value).expanduser().exists():
        return argument
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, escaped)
    return f"{plus}{key}='{escaped}'"


def refuse_point_keys(overrides: Iterable[str]) -> None:
    """Raise ValueError for what would move a sweep's point out of the sweep's directory."""
    for key in ("run_dir", "name"):
        if any(o.startswith(f"{key}=") and (key == "run_dir" or "," in o) for o in overrides):
            raise ValueError(f"{key}= cannot be set in a sweep: its points lie in hydra.sweep.dir, a folder each")


def point_dir(folder: Path) -> str:
    """Return a point's directory as its config names it: relative where it lies under the working directory."""
    folder, here = folder.absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def inside(name: str) -> str:
    """Return a run's name. Raises: ValueError if a folder of that name would lie anywhere but in its parent."""
    name = str(name)
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or name != name.strip():
        raise ValueError(f"name={name!r} would leave its folder: a name is one folder's, without slashes")
    return name


def agree_on_start_time(multirun: bool) -> None:
    """Put the time of the start into the environment, from which `run_dir` takes it: one directory for all ranks.

    Under torchrun each rank composes for itself; rank 0's time travels through torchrun's own store.
    """
    stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{time.time_ns() // 1000 % 1_000_000:06d}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" in os.environ:
        if multirun:
            raise ValueError(
                "a sweep (-m) under torchrun would run in every process: use launcher=local without torchrun"
            )
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"sftlab/start_time/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ["RANK"] == "0":
            store.set(key, stamp)
        stamp = store.get(key).decode()
    os.environ[START_TIME] = stamp


def complain(text: str) -> None:
    """Print an error to standard error, in red on a terminal, with the rank where there are several."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    text = f"error{f' on rank {rank}' if rank else ''}: {secret.strike(text)}"
    print(f"\033[31m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def explain(error: BaseException, config_name: str) -> str:
    """Return what to show for an error: its message where that teaches, else a traceback."""
    while isinstance(error, InstantiationException) and error.__cause__:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no default: give one, {error.full_key}=..."
    cause = error.__cause__ if isinstance(error, CompactHydraException) else None
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        text = str(cause if isinstance(cause, OmegaConfBaseException) else error).split("\n    full_key")[0]
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
        return text_of_hydra(str(error), text, config_name)
    if isinstance(error, TAUGHT) and not os.environ.get("SFTLAB_TRACEBACK"):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def text_of_hydra(message: str, text: str, config_name: str) -> str:
    """Return a composition error in plain words, with the nearest key or option."""
    unknown = re.search(r"Could not override '([^']+)'", message)
    unknown = unknown or re.search(r"Key '([^']+)' is not in struct", message)
    if unknown:
        return unknown_key(unknown.group(1).lstrip("+"), keys(config_name))
    option = re.search(r"Could not (?:find|override) '([\w./@]+)/([^/']+)'", message)
    if option:
        group, name = option.groups()
        known = options(group)
        return f"{group}={name}: no such option; {nearest(name, known)}the options are {', '.join(known)}"
    return text


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key: which options of its group take it, or the nearest key there is."""
    known = list(known)
    group, _, leaf = key.partition(".")
    keys_of = {o: keys_of_option(group, o) for o in options(group)} if leaf else {}
    takers = [o for o, theirs in keys_of.items() if leaf in theirs]
    if takers:
        names = " and ".join(f"{group}={t}" for t in takers)
        return f"{key}: the chosen {group} option has no such key; it belongs to {names}"
    known += sorted({f"{group}.{k}" for theirs in keys_of.values() for k in theirs} - set(known))
    return f"{key}: no such key; {nearest(key, known) or 'see --cfg job for those there are'}".rstrip("; ")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for the known name most like `name`, or nothing."""
    known = list(known)
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    found = difflib.get_close_matches(name, known, 1, 0.6) or [
        by_leaf[m] for m in difflib.get_close_matches(name.rpartition(".")[2], by_leaf, 1, 0.7)
    ]
    return f"did you mean {found[0]}? " if found else ""


def keys(config_name: str) -> list[str]:
    """Return every dotted key of the command's default config, and its groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name)
    return [*flat(OmegaConf.to_container(config, resolve=False)), *(p.name for p in CONF.iterdir() if p.is_dir())]


def flat(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a tree of dicts."""
    if not isinstance(node, dict):
        return []
    return [key for k, v in node.items() for key in (f"{prefix}{k}", *flat(v, f"{prefix}{k}."))]


def options(group: str) -> list[str]:
    """Return the options of a config group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def keys_of_option(group: str, option: str) -> set[str]:
    """Return the dotted keys that one option's YAML sets for its group, with those of the options it builds on."""
    file = CONF / group / f"{option}.yaml"
    body = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(body, dict)
    bases = [b for b in body.pop("defaults", []) if isinstance(b, str) and b != "_self_"]
    own = body.get(group, {}) if "@package _global_" in file.read_text() else body
    return set(flat(own)).union(*(keys_of_option(group, base) for base in bases))
