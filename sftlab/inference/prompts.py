"""Read prompts from the rows of a file; write the answers to a file that a later command can continue."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftlab.common.files import write_jsonl
from sftlab.common.progress import bar
from sftlab.data.format import Fields, Format
from sftlab.data.tokenise import refuse_halves
from sftlab.inference.decoding import decode
from sftlab.inference.loaded_model import LoadedModel
from sftlab.inference.next_token import DecodingSettings, Prompt


@dataclass(frozen=True)
class Request:
    """One prompt: its text for people, its tokens for the model, and whether it is a turn of a chat."""

    text: str
    tokens: Prompt
    chat: bool = False


def request(loaded: LoadedModel, fields: Fields, format: Format | None) -> Request:
    """Return the request of a row: its `prompt` unchanged, its `messages`, or the run's text format filled in.

    Raises: ValueError if it holds none of these.
    """
    if isinstance(fields.get("prompt"), str):
        return Request(fields["prompt"], loaded.encode(fields["prompt"]))
    if isinstance(fields.get("messages"), list):
        messages = fields["messages"]
        if messages and messages[-1].get("role") == "assistant":  # the answer to find, as in training data
            messages = messages[:-1]
        return Request(json.dumps(messages, ensure_ascii=False), loaded.encode_chat(messages), chat=True)
    if format is None:
        raise ValueError(f"no field 'prompt' or 'messages'; it has {', '.join(map(repr, fields)) or 'none'}")
    text = format.prompt_text(format.row(fields))
    return Request(text, loaded.encode(text))


def read_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    """Yield (where, row) of a prompts file: JSON objects of a .jsonl, else one prompt per non-empty line."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts={path}: no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield f"{path}:{number}", {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: this line is not JSON ({error})") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or deep nesting
            raise ValueError(f"{path}:{number}: this line cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}:{number}", row


def read_requests(loaded: LoadedModel, path: Path, format: Format | None) -> list[Request]:
    """Return the requests of a prompts file. Raises: ValueError that names the row at fault."""
    requests = []
    for where, fields in read_rows(path):
        try:
            made = request(loaded, fields, format)
            refuse_halves(made.text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        except Exception as error:  # a format, a template or the tokenizer may raise anything
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        requests.append(made)
    if not requests:
        raise ValueError(f"prompts={path}: it holds no prompt")
    return requests


def answer_file(
    loaded: LoadedModel, requests: Sequence[Request], output: Path, decoding: DecodingSettings, settings: Any
) -> int:
    """Return how many answers `output` already held; write the others, one JSON object per line.

    Each batch is appended when it is done. At the end the file is rewritten in the order of the requests.
    Raises: ValueError if `output` holds answers to other prompts, or answers made with other `settings`.
    """
    done = answered(output, requests, settings)
    todo = [i for i in range(len(requests)) if i not in done]
    ends = loaded.turn_ends() if any(r.chat for r in requests) else loaded.ends
    output.parent.mkdir(parents=True, exist_ok=True)
    with bar("answers", len(requests), len(done)) as advance, output.open("a", encoding="utf-8") as file:
        for i, tokens in decode(loaded.scorer, [requests[i].tokens for i in todo], decoding, ends, numbers=todo):
            index = todo[i]
            line = {
                "index": index,
                "prompt": requests[index].text,
                "answer": loaded.decode_text(tokens).strip(),
                **settings,
            }
            done[index] = line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            advance(1)
    write_jsonl(output, [done[i] for i in sorted(done)])
    return len(requests) - len(todo)


def answered(output: Path, requests: Sequence[Request], settings: Any) -> dict[int, Any]:
    """Return the lines that `output` already holds, by index; a torn last line is cut off."""
    if not output.exists():
        return {}
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = {line["index"]: line for line in map(json.loads, whole.split("\n")[:-1])}  # a text may hold U+2028
        same = all(line.items() >= settings.items() for line in lines.values())
        same = same and all(lines[i]["prompt"] == requests[i].text for i in lines)
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
        same = False
    if not same:
        raise ValueError(
            f"output={output} holds something other than answers of this model to these prompts with these settings: "
            "name another file, or delete it"
        )
    if whole != text:
        output.write_text(whole, encoding="utf-8")
    return lines
