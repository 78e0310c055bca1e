"""How every command starts: quote the overrides, agree on a start time, call Hydra, show errors, exit with a code.

Imports Hydra and nothing heavy, so that `--help` and `--cfg job` answer at once.
"""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra

from sftlab.common import secrets
from sftlab.common.hangup import hangups
from sftlab.common.process import end_with_parent, tie_forks
from sftlab.config import completion, winner
from sftlab.config.command_keys import check_command
from sftlab.config.composing import START_TIME, register, start_time
from sftlab.config.errors import CONFIG_FILE, complain, explain
from sftlab.config.groups import CONF, hide_bases
from sftlab.config.latest import settle
from sftlab.config.overrides import add_sources, quote
from sftlab.config.srun import adopt_srun

# Hydra's own flags; it takes their beginnings too.
FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
)
SWEEPING = r"\+?(launcher=(?!none$).*|sweeper=(?!grid$).*)"  # these options make a command a sweep without -m


def main(task: Callable[[Any], float | None], config_name: str) -> None:
    """Run `task` on the config composed from `config_name` and the command line. On an error, show it and exit with 1.

    Hydra's own handler drops the traceback of a failed job and every suggestion, so we ask it for the raw errors.
    """
    tie_forks()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank: it saves and ends if torchrun is killed
        end_with_parent(signal.SIGTERM)
    with hangups():
        compose_and_run(task, config_name)


def compose_and_run(task: Callable[[Any], float | None], config_name: str) -> None:
    """Do what `main` does, on a terminal that may go away."""
    if one_local_run(sys.argv[1:]) or (config_name == "doctor" and any(a.startswith("launcher=") for a in sys.argv)):
        sys.argv.append("hydra.mode=RUN")  # conf/launcher/local.yaml says MULTIRUN
    multirun = is_sweep(sys.argv[1:])
    try:
        refuse_dashes(sys.argv[1:])
        sys.argv[1:] = [quote(a, multirun) for a in add_sources(settle(sys.argv[1:], config_name))]
    except ValueError as error:
        complain(str(error))
        sys.exit(1)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    hide_bases()
    register()
    script = completion.prepare(sys.argv[1:], as_module=sys.argv[0].endswith(".py"))
    if script:
        print(script)
        return
    try:
        if config_name == "train":
            secrets.refuse_overrides(sys.argv[1:])  # before Hydra writes multirun.yaml
            adopt_srun()
        winner.refuse_foreign(sys.argv[1:])
        agree_on_start_time(multirun)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(past_hydra(task, config_name))()
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # otherwise the run has said it already
            complain("interrupted")
        sys.exit(130)
    except Failed as failed:
        complain(explain(failed.error, config_name))
        sys.exit(1)
    except Exception as error:
        complain(explain(error, config_name))
        sys.exit(1)


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether a command line is one of several runs: the words of Hydra, or a launcher or a search."""
    if "hydra.mode=RUN" in arguments:
        return False
    return any(a in ("-m", "--multirun") or re.fullmatch(SWEEPING, a) for a in arguments)


def one_local_run(arguments: Sequence[str]) -> bool:
    """Return whether launcher=local is asked for one run: nothing is swept, so its processes are those of a run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    words = [a for a in arguments if not a.startswith("-")]
    searched = {"-m", "--multirun", "launcher.dry_run=true", "sweeper=optuna"} & set(arguments)
    if "launcher=local" not in words or searched or any(a.startswith(("hydra.sweep", "hydra.mode")) for a in words):
        return False
    try:
        parsed = OverridesParser.create().parse_overrides([quote(a, multirun=True) for a in words])
    except HydraException:  # told when the command is composed
        return False
    return not any(override.is_sweep_override() for override in parsed)


def refuse_dashes(arguments: Sequence[str]) -> None:
    """Raise ValueError for a setting that is typed as a flag, as other trainers have them."""
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "--config":
            raise ValueError(f"{word}: {CONFIG_FILE}")
        if name.startswith("--") and len(name) > 2 and not any(flag.startswith(name) for flag in FLAGS):
            key = name[2:].replace("-", "_")
            raise ValueError(f"{word}: settings are typed KEY=VALUE, without dashes: {key}={value or '...'}")


class Failed(BaseException):
    """Carries the error of a single run past Hydra, which would print a line of its own for an Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def past_hydra(task: Callable[[Any], float | None], config_name: str) -> Callable[[Any], float | None]:
    """Return `task` with its errors carried past Hydra. In a sweep Hydra gets them, so that other points still run."""

    @functools.wraps(task)
    def run(cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            check_command(config_name, cfg)
            return task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.RUN:
                raise Failed(error) from error
            raise

    return run


def chosen_option(group: str) -> str:
    """Return the option of a config group that the running command composed."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices[group])


def agree_on_start_time(multirun: bool) -> None:
    """Put the start time into the environment, where `run_dir` reads it, so that all ranks share one directory.

    Under torchrun and srun each rank composes its own config, so rank 0 sends its time through the store.
    """
    stamp = start_time()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" in os.environ:
        if multirun:
            raise ValueError(
                "a sweep (-m) under torchrun or srun would run in every process: use launcher=local, or launcher=slurm "
                "from one process"
            )
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"sftlab/start_time/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ["RANK"] == "0":
            store.set(key, stamp)
        stamp = store.get(key).decode()
    os.environ[START_TIME] = stamp
