"""Twelve conversations, one for each thing that chat templates are known to get wrong. See README.md."""

from typing import Any

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "one number"},
                "b": {"type": "number", "description": "another"},
            },
            "required": ["a", "b"],
        },
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(number: int, a: int, b: int) -> dict[str, Any]:
    arguments = {"a": a, "b": b}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "add", "arguments": arguments}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "add", "content": content}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("Say one."), assistant("One.")]},
    "three turns": {
        "messages": [user("Say one."), assistant("One."), user("Two?"), assistant("Two."), user("3?"), assistant("3.")]
    },
    "next says end": {"messages": [user("Who?"), assistant("They."), user("end"), assistant("Right.")]},
    "spaces": {"messages": [user(" Who? "), assistant("\n They. \n"), user("So?"), assistant("Yes.\n\n")]},
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Who?"),
            assistant("They."),
            user("So?"),
            assistant("Yes."),
        ]
    },
    "empty system": {"messages": [{"role": "system", "content": ""}, user("Who?"), assistant("They.")]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("Who?"), assistant("They.")]},
    "one call": {
        "messages": [
            user("1 and 2?"),
            assistant(None, tool_calls=[call(1, 1, 2)]),
            result(1, "3"),
            assistant("Three."),
        ],
        "tools": [ADD],
    },
    "parallel calls": {
        "messages": [
            user("1 and 2, 3 and 4?"),
            assistant(None, tool_calls=[call(1, 1, 2), call(2, 3, 4)]),
            result(1, "1"),
            result(2, "7"),
            assistant("Three, seven."),
        ],
        "tools": [ADD],
    },
    "reasoning": {"messages": [user("1+1?"), assistant("2", reasoning_content="add one")]},
    "reasoning twice": {
        "messages": [
            user("1+1?"),
            assistant("2", reasoning_content="add one"),
            user("2+2?"),
            assistant("4", reasoning_content="add two"),
        ]
    },
    "think in content": {"messages": [user("1+1?"), assistant("<think>\nadd one\n</think>\n\n2")]},
}
