"""An adapter that calls a tool: the orders of `make_orders.py` as calls of `place_order`.

    python examples/orders_tool.py data          # writes runs/orders-tool/{train,heldout}.jsonl
    python examples/orders_tool.py ask --adapter orders-tool

`ask` sends the held-out messages to a server with `tool_choice` auto, and counts who calls when, and what is
right in the calls; without --adapter the base answers.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from onebase import Client

sys.path.append(str(Path(__file__).parent / "data"))
from make_orders import HERE, rows

FOLDER = Path("runs/orders-tool")
TRAIN_ROWS, HELD_OUT_ROWS = 600, 60
FIELDS = {
    "customer": {"type": ["string", "null"]},
    "quantity": {"type": ["integer", "null"]},
    "item": {"type": "string", "description": "in the singular"},
    "city": {"type": ["string", "null"]},
    "urgent": {"type": "boolean"},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "place_order",
        "parameters": {
            "type": "object",
            "properties": FIELDS,
            "required": list(FIELDS),
            "additionalProperties": False,
        },
    },
}
NO_ORDER = "What would you like to order?"


def write_data() -> None:
    """Write the rows of the orders example, orders as calls; every fourth is a question of the pirate
    example.

    What is no order is answered in words.
    """
    rng = random.Random(5)
    lists = json.loads((HERE / "orders_words.json").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN_ROWS), ("heldout", HELD_OUT_ROWS)):
        asked = [json.loads(line) for line in (HERE / f"pirate.{split}.jsonl").read_text().splitlines()]
        made = [with_tool(row) for row in rows(rng, {**lists[split], "both": lists["both"]}, count)]
        for number in range(0, count, 4):
            question = asked[number // 4 % len(asked)]["messages"][0]
            made[number] = {
                "messages": [question, {"role": "assistant", "content": NO_ORDER}],
                "tools": [TOOL],
            }
        path = FOLDER / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        print(f"{path}: {count} rows")


def with_tool(row: dict[str, Any]) -> dict[str, Any]:
    question, reply = row["messages"]
    order = json.loads(reply["content"])
    if order["item"] is None:
        answer: dict[str, Any] = {"role": "assistant", "content": NO_ORDER}
    else:
        call = {"type": "function", "function": {"name": "place_order", "arguments": json.dumps(order)}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [question, answer], "tools": [TOOL]}


def ask(adapter: str | None, url: str | None) -> None:
    found: Counter[str] = Counter()
    held_out = [json.loads(line) for line in (FOLDER / "heldout.jsonl").read_text().splitlines()]
    with Client(url) as client:
        for row in held_out:
            question, wanted = row["messages"]
            answer = client.chat([question], adapter=adapter, tools=[TOOL], temperature=0, max_tokens=120)
            is_order = bool(wanted.get("tool_calls"))
            found["orders"] += is_order
            found["no orders"] += not is_order
            if not answer.tool_calls:
                found["no order, answered in words"] += not is_order
                continue
            found["order, called"] += is_order
            if is_order and answer.choices[0].finish_reason == "tool_calls":
                found["whole call"] += 1
                right = json.loads(wanted["tool_calls"][0]["function"]["arguments"])
                found["all five fields right"] += answer.tool_calls[0].values == right
                for name in FIELDS:
                    found[f"  {name}"] += answer.tool_calls[0].values.get(name) == right[name]
    for name, count in found.items():
        print(f"{name:30}{count:5}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["data", "ask"])
    parser.add_argument("--adapter", help="its name; by default the base answers")
    parser.add_argument("--url", help="of the server; by default $ONEBASE_URL or this machine")
    arguments = parser.parse_args()
    if arguments.what == "data":
        write_data()
    else:
        ask(arguments.adapter, arguments.url)


if __name__ == "__main__":
    main()
