"""Measure an example adapter on its held-out set against the base, plain and asked in words.

    python examples/evaluate_example.py orders
    python examples/evaluate_example.py pirate --show 5

Everything runs on the NF4 base; replies are greedy. The held-out loss is in nats per supervised token.
"""

import argparse
import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import peft_view
from onebase_training.data.reader import load_dataset
from onebase_training.recipe import Recipe

EXAMPLES = Path(__file__).parent
MAX_REPLY_TOKENS = 72
BATCH = 16
ORDER_FIELDS = ("customer", "quantity", "item", "city", "urgent")

# What the base is told in the system turn when it is asked in words, as one would without an adapter.
IN_WORDS = {
    "orders": (
        "Extract the order from the user's message. Answer with one JSON object and nothing else, with keys "
        "customer, quantity (a number), item (in the singular), city and urgent (true or false); "
        "use null for what is not said."
    ),
    "pirate": "Answer briefly, and always speak like a pirate.",
}
PIRATE_MARKS = (
    r"\b(?:arr|ahoy|matey|ye|yer|avast|landlubber|aye|savvy|yo ho)\b|\b(?:th|an|o|t)'(?= )|\w{3,}in'(?!\w)"
)


def is_json(reply: str, wanted: str) -> bool:
    """Return True if the whole reply is one JSON object with exactly the wanted keys."""
    with contextlib.suppress(ValueError):
        found = json.loads(reply)
        return isinstance(found, dict) and set(found) == set(json.loads(wanted))
    return False


def is_exact(reply: str, wanted: str) -> bool:
    """Return True if every field of the object is right."""
    return is_json(reply, wanted) and json.loads(reply) == json.loads(wanted)


def is_right(field: str, reply: str, wanted: str) -> bool:
    """Return True if one field of the object is right."""
    return is_json(reply, wanted) and json.loads(reply)[field] == json.loads(wanted)[field]


def is_pirate(reply: str, _wanted: str) -> bool:
    """Return True if the reply has at least three different pirate words."""
    return len(set(re.findall(PIRATE_MARKS, reply.lower()))) >= 3


MEASURES: dict[str, dict[str, Callable[[str, str], bool]]] = {
    "orders": {
        "strict JSON": is_json,
        "all fields right": is_exact,
        **{f"{field} right": functools.partial(is_right, field) for field in ORDER_FIELDS},
    },
    "pirate": {"pirate speech": is_pirate},
}


@torch.inference_mode()
def held_out_loss(model, tokenizer, conversations: list) -> float:
    """Return the loss in nats per supervised token, over all conversations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
        rows = load_dataset(path, tokenizer, Recipe()).rows
    total = 0.0
    for row in rows:
        ids = torch.tensor(row.ids, dtype=torch.int64, device=model.device)
        targets = torch.tensor(row.supervised).nonzero()[:, 0]
        logits = model(input_ids=ids[None], logits_to_keep=targets - 1).logits[0].float()
        total += cross_entropy(logits, ids[targets], reduction="sum").item()
    return total / sum(row.targets for row in rows)


@torch.inference_mode()
def answer(model, tokenizer, conversations: list) -> list[tuple[str, bool]]:
    """Greedy replies, and whether each ended by itself."""
    replies = []
    for at in range(0, len(conversations), BATCH):
        inputs = tokenizer.apply_chat_template(
            [messages[:-1] for messages in conversations[at : at + BATCH]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False)
        for ids in out[:, inputs["input_ids"].shape[1] :]:
            ended = tokenizer.eos_token_id in ids.tolist()
            replies.append((tokenizer.decode(ids, skip_special_tokens=True), ended))
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an example adapter on its held-out set.")
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--base", type=Path, help="folder of the base (default: the default base)")
    parser.add_argument("--adapter", type=Path, help="default: examples/adapters/<name>")
    parser.add_argument("--show", type=int, default=3, help="how many replies to print")
    args = parser.parse_args()

    folder = args.base or fetch_default_base(lambda message, _: print(message))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    adapter = args.adapter or EXAMPLES / "adapters" / args.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(BaseSettings(folder, device=device))
    model = PeftModel.from_pretrained(peft_view(base), adapter).eval()
    lines = (EXAMPLES / "data" / f"{args.name}.heldout.jsonl").read_text().splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    instructed = [
        [{"role": "system", "content": IN_WORDS[args.name]}, *messages] for messages in conversations
    ]

    for title, asked, with_adapter in (
        ("base", conversations, False),
        ("base, asked in words", instructed, False),
        ("base with adapter", conversations, True),
    ):
        with contextlib.nullcontext() if with_adapter else model.disable_adapter():
            loss = held_out_loss(model, tokenizer, asked)
            replies = answer(model, tokenizer, asked)
        figures = [f"loss {loss:.3f}", f"ended by itself {sum(ended for _, ended in replies)}/{len(replies)}"]
        for what, holds in MEASURES[args.name].items():
            good = sum(holds(reply, m[-1]["content"]) for (reply, _), m in zip(replies, asked, strict=True))
            figures.append(f"{what} {good}/{len(replies)}")
        print(f"\n{title}: {', '.join(figures)}", flush=True)
        for (reply, _), messages in list(zip(replies, asked, strict=True))[: args.show]:
            print(f"  > {messages[-2]['content']}\n    {reply}")


if __name__ == "__main__":
    main()
