"""python -m sftlab.generate run=DIR prompt="...": a model's answer to a prompt, to a file of prompts, or in a chat."""

import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sftlab.common.words import plain
from sftlab.config import start

DECODING = ("max_new_tokens", "batch_size", "temperature", "top_k", "top_p", "seed")


def generate(cfg: DictConfig) -> None:
    """Answer what is asked."""
    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    asked = [key for key in ("prompt", "fields", "prompts") if given[key] not in (None, {})]
    if len(asked) > 1 or not (asked or given["chat"]):
        raise ValueError('ask one thing: prompt="...", fields.NAME="...", prompts=FILE output=FILE, or chat=true')
    if asked == ["prompts"] and (given["output"] is None or given["chat"]):
        raise ValueError("prompts=FILE needs output=FILE, and takes chats as rows with messages, not chat=true")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("generate runs in one process: start it without torchrun")

    from sftlab.common.hub import quiet_transformers
    from sftlab.inference.loaded_model import LoadedModel
    from sftlab.inference.next_token import DecodingSettings
    from sftlab.inference.trained_model import resolve
    from sftlab.parallel.world import device_of
    from sftlab.training.build import component

    decoding = DecodingSettings(**{key: given[key] for key in DECODING})
    trained = resolve(given["run"], given["trust"])
    quiet_transformers()
    format = component("data.format", trained.format) if trained.format else None
    loaded = LoadedModel.load(trained, device_of(0))
    if given["chat"]:
        talk(loaded, given, decoding)
    elif given["prompts"] is not None:
        answer(loaded, format, given, decoding)
    else:
        from sftlab.inference.decoding import decode
        from sftlab.inference.prompts import request

        fields = given["fields"] or {"prompt": text_of(given["prompt"])}
        if given["fields"] and format is None:
            raise ValueError(f"fields: run={given['run']} names a model without its run's text format: use prompt=")
        asked_for = request(loaded, fields, format)
        ((_, tokens),) = decode(loaded.scorer, [asked_for.tokens], decoding, loaded.ends)
        print(plain(loaded.decode_text(tokens).strip()))


def text_of(prompt: str) -> str:
    """Return the prompt; `-` is what standard input holds, without the newline that ends its last line."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def talk(loaded: Any, given: dict[Any, Any], decoding: Any) -> None:
    """Hold a conversation, or answer one message."""
    from sftlab.inference.chat import converse, opening, show, stream, typed

    messages = opening(given["system"])
    loaded.encode_chat(
        [*messages, {"role": "user", "content": ""}]
    )  # complain about a missing template before the first turn
    if given["prompt"] is None:
        converse(loaded, typed(), decoding, messages)
    else:
        stream(loaded, [*messages, {"role": "user", "content": text_of(given["prompt"])}], decoding, show)
        show("\n")


def answer(loaded: Any, format: Any, given: dict[Any, Any], decoding: Any) -> None:
    """Answer a file of prompts."""
    from sftlab.inference.prompts import answer_file, read_requests

    requests = read_requests(loaded, Path(given["prompts"]).expanduser(), format)
    settings = {key: given[key] for key in ("run", *DECODING) if key != "batch_size"}
    output = Path(given["output"]).expanduser()
    before = answer_file(loaded, requests, output, decoding, settings)
    print(f"{len(requests)} answers in {output}" + (f", {before} of them from an earlier run" if before else ""))


def main() -> None:
    """Entry point."""
    start.main(generate, "generate")


if __name__ == "__main__":
    main()
