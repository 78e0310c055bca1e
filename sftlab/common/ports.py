"""Where ranks meet: ports that every rank of a SLURM job knows without a word, and a store that listens on one address.

torch's own store listens on every interface, so that anybody in the network could write into it.
"""

import socket
from datetime import timedelta
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# These lie below the ports that Linux gives to outgoing connections (32768 to 60999). Submitit draws its port from
# 20000 to 60000: in a test run it drew one that was in use, and the job failed with EADDRINUSE.
PORTS = range(20_000, 32_768)
STEPS = 101  # jobs may share a node, and so may steps of one job


def job_port(job_id: str, step: int = 0) -> int:
    """Return the port at which a job's ranks meet; jobs that may share a node get different ports."""
    return PORTS[(int(job_id) + STEPS * step) % len(PORTS)]


def keep_store(host: str, port: int, timeout_min: float = 5.0) -> Any:
    """Return a store that listens on this address alone."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, reuse_port=False)
    wait = timedelta(minutes=timeout_min)
    return TCPStore(
        host, port, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def visit_store(host: str, port: int, timeout_min: float = 5.0) -> Any:
    """Return the store that another process keeps."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, is_master=False, timeout=timedelta(minutes=timeout_min))
