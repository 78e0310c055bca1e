"""How every command starts: quote the overrides, agree on a start time, call Hydra, show errors, exit with a code.

Imports Hydra and nothing heavy, so that `--help` and `--cfg job` answer at once.
"""

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import OmegaConf

from sftlab.config import completion
from sftlab.config.errors import complain, explain
from sftlab.config.groups import CONF, hide_bases
from sftlab.config.overrides import GIVEN, inside, quote

START_TIME = "SFTLAB_START_TIME"


SWEEPING = r"\+?(launcher=(?!none$).*|sweeper=(?!grid$).*)"  # these options make a command a sweep without -m


def main(task: Callable[[Any], float | None], config_name: str) -> None:
    """Run `task` on the config composed from `config_name` and the command line. On an error, show it and exit with 1.

    Hydra's own handler drops the traceback of a failed job and every suggestion, so we ask it for the raw errors.
    """
    multirun = any(a in ("-m", "--multirun") or re.fullmatch(SWEEPING, a) for a in sys.argv[1:])
    sys.argv[1:] = [quote(a, multirun) for a in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    hide_bases()
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
    """Carries the error of a single run past Hydra, which would print a line of its own for an Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def past_hydra(task: Callable[[Any], float | None]) -> Callable[[Any], float | None]:
    """Return `task` with its errors carried past Hydra. In a sweep Hydra gets them, so that other points still run."""

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


def chosen_option(group: str) -> str:
    """Return the option of a config group that the running command composed."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices[group])


def agree_on_start_time(multirun: bool) -> None:
    """Put the start time into the environment, where `run_dir` reads it, so that all ranks share one directory.

    Under torchrun each rank composes its own config, so rank 0 sends its time through torchrun's store.
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
