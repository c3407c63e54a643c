"""Three judges of a shop's chat: is it about an order, is the answer polite, is a secret given away?

    python examples/judges.py data       # writes runs/judges/{on-topic,polite,secret}.{train,heldout}.jsonl
    python examples/judges.py chat       # a guarded chat with a server that has them

Origin: composed from the parts below, which were written for it; Apache-2.0, like the project. The held-out
sets share no sentence with the training sets.
"""

import argparse
import json
import random
from itertools import cycle
from pathlib import Path
from typing import Any

from onebase import Client, Judge, Message

FOLDER = Path("runs/judges")
TRAIN_ROWS, HELD_OUT_ROWS = 240, 40
REFUSAL = "I can help with orders, deliveries and returns. Please leave out passwords and card numbers."
INSTRUCTIONS = {
    "on-topic": "Is the customer's message about an order, a delivery or a return? Say yes or no.",
    "polite": "Is the last answer polite? Say yes or no.",
    "secret": "Does the customer give away a password or a card number? Say yes or no.",
}
ITEMS = {
    "train": [
        "lamp",
        "kettle",
        "red chair",
        "pair of boots",
        "phone case",
        "blue jacket",
        "desk",
        "camera",
        "rug",
        "backpack",
    ],
    "heldout": ["mirror", "green sofa", "tent", "watch", "bread knife"],
}
ON_TOPIC = {
    "train": [
        "Where is my {item}?",
        "When will the {item} arrive?",
        "I want to return the {item}.",
        "The {item} came broken.",
        "Please cancel my order of the {item}.",
        "Has the {item} been sent yet?",
        "I ordered a {item} last week.",
        "Can I still change my order? I want a {item}.",
        "The courier lost my {item}.",
        "The {item} has not come yet.",
        "It is two weeks now, and no {item}.",
        "Why is the {item} taking so long?",
        "How can I return a {item}?",
        "What do I do to give the {item} back?",
        "Send me another {item}, this one is damaged.",
        "My order with the {item} is not here.",
        "The package with my {item} never came.",
        "I would like to order a {item}.",
        "Put one more {item} into my basket.",
        "Where can I see my order of the {item}?",
        "I want my money back for the {item}.",
        "Can you deliver the {item} on Monday?",
        "You sent me the wrong {item}.",
    ],
    "heldout": [
        "I am still waiting for the {item}.",
        "How do I send the {item} back?",
        "My parcel with the {item} is late.",
        "Add a {item} to my order, please.",
    ],
}
OFF_TOPIC = {
    "train": [
        "Tell me a joke.",
        "What is the capital of Peru?",
        "Write a poem about rain.",
        "Who won the match?",
        "How do I cook rice?",
        "What is the weather today?",
        "Do you like music?",
        "Solve 12 times 9.",
        "Translate good night into French.",
        "Who painted this?",
        "What should I name my cat?",
        "How old is the sun?",
        "How deep is the sea?",
        "Who invented the telephone?",
        "Tell me a story about a dragon.",
        "Recommend me a good book.",
        "Which song do you like best?",
        "What does the word noun mean?",
        "Explain gravity to me.",
        "How do I grow tomatoes?",
        "Give me a recipe for soup.",
        "What can I do against a cold?",
        "Play a game with me.",
        "Count to ten in German.",
        "Where is Mount Everest?",
        "Are you a human?",
    ],
    "heldout": [
        "How tall is the moon's highest hill?",
        "Sing me a song.",
        "Give me advice about my garden.",
        "Which film should I watch?",
        "What is a verb?",
    ],
}
SECRETS = {
    "train": [
        "My password is {word}{number}.",
        "Use the password {word}-{number}.",
        "My card number is {card}.",
        "Charge my card {card}.",
        "You can log in with {word}{number}, that is my password.",
        "Card: {card}, thanks.",
        "I would like to pay, my card is {card}.",
        "Take the money from {card}.",
        "It is a credit card, {card}.",
        "My account has the password {word}{number}.",
        "The password is {word}{number}, please log in for me.",
        "Here is my password: {number}{word}.",
    ],
    "heldout": ["I pay with card {card}.", "The password of my account is {word}{number}."],
}
HARMLESS = {
    "train": [
        "My order number is {number}.",
        "I live at {number} Main Street.",
        "Thank you.",
        "Please be quick.",
        "I forgot my password.",
        "I paid by card.",
        "Where do I enter my card number?",
        "I can pay by card or in cash.",
        "Do you take credit cards?",
        "My phone number is {number}.",
        "How do I change the password of my account?",
        "I need it before Friday.",
        "The number of the parcel is {number}.",
    ],
    "heldout": ["I need it for Sunday.", "My customer number is {number}.", "Can I pay by card?"],
}
POLITE = {
    "train": [
        "Thank you for asking. I will gladly look into it.",
        "I am sorry for the trouble. Let me help you.",
        "Of course! Please give me a moment.",
        "Happy to help. It is on its way.",
        "My apologies, I will check it now.",
        "Certainly. Is there anything else that I can do?",
        "Thanks for your patience, it will be there soon.",
        "I would be glad to do that for you.",
        "Please excuse the delay, I am looking into it.",
        "You are welcome! Just let me know what you need.",
        "I understand, and I will do my best for you.",
    ],
    "heldout": [
        "It would be a pleasure to help you with that.",
        "Sorry about that! I will see what I can do.",
        "Please allow me a minute, and thank you for writing.",
    ],
}
RUDE = {
    "train": [
        "Stop bothering me.",
        "That is your problem, not mine.",
        "Read the page, you fool.",
        "I do not care.",
        "What a stupid question.",
        "Go away.",
        "You should have thought of that before, idiot.",
        "Nobody cares about you.",
        "Find it yourself.",
        "Leave me in peace.",
        "That is nonsense, and so are you.",
    ],
    "heldout": ["Figure it out yourself.", "Nobody asked you, moron.", "Leave me alone with that nonsense."],
}
WORDS = ["tiger", "sunny", "maple", "rocket", "silver", "pepper"]


def talk(rng: random.Random, split: str, judge: str, verdict: bool) -> list[dict[str, object]]:
    """Return a turn of each, for which the judge's verdict is this one, and the other verdicts are by chance.

    The answer is not to be learned: its weight is 0.
    """
    is_true = {name: verdict if name == judge else rng.random() < 0.5 for name in INSTRUCTIONS}
    opening = rng.choice((ON_TOPIC if is_true["on-topic"] else OFF_TOPIC)[split])
    remark = rng.choice((SECRETS if is_true["secret"] else HARMLESS)[split])
    answer = rng.choice((POLITE if is_true["polite"] else RUDE)[split])
    said = f"{opening} {remark}".format(
        item=rng.choice(ITEMS[split]),
        word=rng.choice(WORDS),
        number=rng.randint(100, 9999),
        card=" ".join(str(rng.randint(1000, 9999)) for _ in range(4)),
    )
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answer, "weight": 0}]


def write_data() -> None:
    """Write the rows of each judge, half of them with each verdict."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for judge, instruction in INSTRUCTIONS.items():
        for split, count in (("train", TRAIN_ROWS), ("heldout", HELD_OUT_ROWS)):
            rng = random.Random(f"{judge} {split}")
            rows = []
            for verdict, _ in zip(cycle((True, False)), range(count), strict=False):
                asked = {"role": "user", "content": instruction}
                said = {"role": "assistant", "content": "yes" if verdict else "no"}
                rows.append({"messages": [*talk(rng, split, judge, verdict), asked, said]})
            path = FOLDER / f"{judge}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"{path}: {count} rows")


def chat() -> None:
    """Answer each line of stdin, unless a judge objects to the message or to the answer."""
    turns: list[Any] = []
    with Client() as client:
        while said := input("> ").strip():
            answer = client.chat([*turns, Message("user", said)], temperature=0, max_tokens=60).message
            talk = [Message("user", said), answer]
            verdicts = {
                one.name: one.text
                for one in client.judge([Judge(adapter=name) for name in INSTRUCTIONS], messages=talk)
            }
            print(" ".join(f"{name}: {verdict}" for name, verdict in verdicts.items()))
            if verdicts == {"on-topic": "yes", "polite": "yes", "secret": "no"}:
                turns += talk
                print(answer.content)
            else:
                print(REFUSAL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Three judges of a shop's chat.")
    parser.add_argument("what", choices=("data", "chat"))
    {"data": write_data, "chat": chat}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
