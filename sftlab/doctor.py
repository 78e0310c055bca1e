"""sftlab doctor: whether this machine, or a cluster's nodes, can train. Each line is ok, or what to do."""

import json
import os
import platform
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sftlab.config import start
from sftlab.config.binding import check_node, resolved


def doctor(cfg: DictConfig) -> None:
    """Examine, print, and exit with 1 if something is broken."""
    from sftlab.common.words import plain
    from sftlab.health import device, nodes, services
    from sftlab.health.finding import Finding, examine, line

    launcher = resolved(OmegaConf.create({"launcher": cfg.launcher}))["launcher"]
    check_node("launcher", launcher)
    checks = device.CHECKS | services.checks(Path(str(cfg.folder)).expanduser())
    unknown = sorted(set(cfg.only) - set(checks))
    if unknown:
        raise ValueError(f"only={unknown[0]}: there is no such check; there are {', '.join(checks)}")
    checks = {name: check for name, check in checks.items() if not cfg.only or name in cfg.only}
    width = max(map(len, checks))

    def show(finding: Finding) -> None:
        if not cfg.json:
            print(plain(line(finding, width)), flush=True)

    if str(launcher.get("_target_", "")).endswith("Slurm"):
        words = [f"folder={cfg.folder}", *([f"only=[{','.join(cfg.only)}]"] if cfg.only else [])]
        found = []
        for node, theirs in nodes.examine_nodes(launcher, words).items():
            print(plain(f"{node}:"))
            for finding in theirs:
                show(finding)
            found += theirs
    else:
        found = examine(checks, show)
    if cfg.json:
        node = os.environ.get("SLURMD_NODENAME") or platform.node()
        told = {"node": node, "findings": [finding.as_json() for finding in found]}
        print(nodes.MARK + json.dumps(told))
        return
    broken = [finding for finding in found if finding.state == "fail"]
    if broken:
        print(f"{len(broken)} to mend: {', '.join(finding.name for finding in broken)}")
        sys.exit(1)


def main() -> None:
    """Entry point."""
    start.main(doctor, "doctor")


if __name__ == "__main__":
    main()
