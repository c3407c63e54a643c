"""Write the orders data: a customer's message in, one strict JSON object out.

    python examples/data/make_orders.py

Origin: composed from the hand-written parts in orders_words.json; nothing is copied from elsewhere.
Licence: Apache-2.0, like the project. The held-out set shares no name, item, adjective, city or way of
putting it with the training set; only number words and nameless greetings are the same.
"""

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TRAIN_ROWS = 2400
HELD_OUT_ROWS = 120
ODD_SHARE = 0.45

Words = dict[str, Any]
"""One split's lists, with those that both splits share under "both". In a sentence {name}, {what} and
{city} are filled in; one without them stands for a field that is not given."""


def thing(rng: random.Random, words: Words) -> tuple[str, str, int | None]:
    """Return one wanted thing: as the message says it, the item's singular, and how many (None if vague)."""
    item = rng.choice(words["items"])
    if rng.random() < 0.5:
        item = f"{rng.choice(words['adjectives'])} {item}"
    kind = rng.random()
    if kind < 0.15:
        article = "an" if item[0] in "aeiou" else "a"
        return f"{article} {item}", item, 1
    if kind < 0.25:
        return f"{rng.choice(words['both']['vague'])} {item}s", item, None
    if kind < 0.55:
        count = rng.randint(2, 99)
        return f"{count} {item}s", item, count
    said, count = rng.choice(list(words["both"]["numbers"].items()))
    return f"{said} {item}{'' if count == 1 else 's'}", item, count


def odd(words: Words) -> Words:
    """Return the same lists with any word as name, item or city, so that copying is learned and not the
    lists."""
    common = words["common_words"]
    names = [word.capitalize() for word in common]
    return {
        **words,
        "first_names": names,
        "last_names": names,
        "cities": names,
        "items": common,
        "adjectives": common,
    }


def order(rng: random.Random, words: Words) -> tuple[str, dict[str, object]]:
    """Return one message and the object that it says."""
    if "common_words" in words and rng.random() < ODD_SHARE:
        words = odd(words)
    what, item, count = thing(rng, words)
    name = " ".join([rng.choice(words["first_names"]), rng.choice(words["last_names"])])
    city = rng.choice(words["cities"])
    hurry = rng.choice(["urgent", "calm", "unsaid", "unsaid"])
    pace = {"urgent": rng.choice(words["urgent"]), "calm": rng.choice(words["calm"]), "unsaid": ""}[hurry]
    if rng.random() < 0.25:
        pieces = [rng.choice(words["one_liners"]), pace]
    else:
        named = rng.choice(["opening", "closing", "nowhere", "opening"])
        placed = rng.random() < 0.75
        together = named == "opening" and placed and rng.random() < 0.3  # one sentence says name and city
        place = rng.choice(words["places"]) if placed and not together else ""
        middle = [rng.choice(words["requests"]), place, pace]
        if rng.random() < 0.3:
            middle.append(rng.choice(words["asides"]))
        rng.shuffle(middle)
        openings = words["openings_placed"] if together else words["openings"]
        opening = rng.choice(openings if named == "opening" else words["both"]["openings"])
        closing = rng.choice(words["closings"] if named == "closing" else words["both"]["closings"])
        pieces = [opening, *middle, closing]
        name = name if named != "nowhere" else ""
        city = city if placed else ""
    text = " ".join(piece for piece in pieces if piece)
    text = text.replace("{name}", name).replace("{city}", city).replace("{what}", what)
    return text[0].upper() + text[1:], {
        "customer": name or None,
        "quantity": count,
        "item": item,
        "city": city or None,
        "urgent": hurry == "urgent",
    }


def rows(rng: random.Random, words: Words, count: int) -> list[dict[str, object]]:
    """`count` conversations; one in twenty is no order and gives nulls."""
    nothing: dict[str, object] = dict.fromkeys(("customer", "quantity", "item", "city"))
    made = []
    for number in range(count):
        if number % 20 == 0:
            text, fields = (
                words["not_orders"][number // 20 % len(words["not_orders"])],
                {**nothing, "urgent": False},
            )
        else:
            text, fields = order(rng, words)
        reply = {"role": "assistant", "content": json.dumps(fields)}
        made.append({"messages": [{"role": "user", "content": text}, reply]})
    rng.shuffle(made)
    return made


def main() -> None:
    rng = random.Random(2)
    lists = json.loads((HERE / "orders_words.json").read_text())
    for split, count in (("train", TRAIN_ROWS), ("heldout", HELD_OUT_ROWS)):
        path = HERE / f"orders.{split}.jsonl"
        made = rows(rng, {**lists[split], "both": lists["both"]}, count)
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        print(f"{path}: {count} rows")


if __name__ == "__main__":
    main()
