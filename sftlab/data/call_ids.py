"""Ids of tool calls, for templates that take no others: Mistral's want nine letters and digits.

OpenAI's ids are longer, and ShareGPT's calls have none. Each call gets an id of that form, and its result the same one.
"""

import re
from collections.abc import Sequence

from sftlab.data.format import Fields

NINE = re.compile(r"[A-Za-z0-9]{9}")


def with_nine(messages: Sequence[Fields]) -> list[Fields]:
    """Return messages whose calls have ids of nine letters and digits; as they are if all have.

    A result belongs to the call whose id it names. Without one it belongs to the first call that has no result yet.
    """
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    if all(NINE.fullmatch(str(call.get("id"))) for call in calls):
        return list(messages)
    renamed: dict[str, str] = {}
    waiting: list[str] = []
    made: list[Fields] = []
    num = 0
    for message in messages:
        if message.get("tool_calls"):
            named = []
            for call in message["tool_calls"]:
                num += 1
                waiting.append(f"call{num:05d}")
                if call.get("id"):
                    renamed[call["id"]] = waiting[-1]
                named.append({**call, "id": waiting[-1]})
            message = {**message, "tool_calls": named}
        elif message["role"] == "tool" and (waiting or message.get("tool_call_id") in renamed):
            ours = renamed.get(message.get("tool_call_id") or "") or waiting[0]
            if ours in waiting:
                waiting.remove(ours)
            message = {**message, "tool_call_id": ours}
        made.append(message)
    return made
