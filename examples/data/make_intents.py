"""Write the intents data: what a customer's message wants, as one of five labels.

    python examples/data/make_intents.py

Origin: composed from the hand-written parts below; nothing is copied from elsewhere. Licence: Apache-2.0,
like the project. The held-out set shares no way of putting it, no item and no opening with the training set.
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
TRAIN_ROWS, HELD_OUT_ROWS = 300, 120

TRAIN: dict[str, list[str]] = {
    "cancel": [
        "please cancel my order of the {}", "I changed my mind about the {}, do not send it",
        "stop the order for the {}", "I no longer need the {}, please call it off",
        "can I still withdraw my order of the {}?", "forget about the {} that I ordered",
        "the {} is not wanted any more, cancel it", "we decided against the {}, so drop the order",
        "we have no use for the {} after all, take us off the list",
        "I would like to cancel the {} while it is still with you",
        "the {} was ordered by mistake, remove it",
        "I found a better {} elsewhere, so cancel mine",
        "kindly take the {} off my order",
        "before you pack the {}: I do not want it any longer",
        "my husband ordered the {} too, so we can cancel one",
        "please withdraw the purchase of the {}",
    ],
    "complaint": [
        "the {} arrived broken", "your {} is of terrible quality", "the {} stopped working after a day",
        "I am very unhappy with the {}", "the {} that you sent has a crack in it",
        "this {} looks nothing like the picture", "the colour of the {} is wrong",
        "the {} smells awful and one part is missing",
        "the {} is damaged on one side",
        "I regret that I ever got this {}",
        "the {} does not work at all",
        "your {} is a piece of junk",
        "there is a dent in the {} and the box was open",
        "the {} makes a strange noise",
        "after one week the {} has already come apart",
        "I did not get what was described: the {} is much too small",
    ],
    "delivery": [
        "where is my {}?", "when will the {} arrive?", "has the {} been sent yet?",
        "the tracking of my {} has not moved for days", "how long does the {} take to reach me?",
        "is the {} on its way?", "my {} should have been here yesterday",
        "which courier brings the {}?",
        "at what time does the van with the {} come?",
        "two weeks and no {} so far",
        "what is the status of the shipment of the {}?",
        "can you tell me the day on which the {} comes?",
        "the parcel with the {} has not turned up",
        "why does the {} take so long to get here?",
        "is there a tracking number for the {}?",
        "the {} was due on Monday and nothing came",
    ],
    "order": [
        "I would like to buy the {}", "please send me a {}", "can I get two of the {}?",
        "put me down for one {}", "I want to order the {} in blue", "we need five of the {} for our office",
        "add a {} to my basket", "I will take the {}",
        "how do I pay for the {}? I want one",
        "one {} for me, to be sent to my home",
        "the {} in your window is what I want to have",
        "our school needs thirty of the {}",
        "let me purchase the {} right away",
        "could you sell me three of the {}?",
        "pack a {} for me and send the bill with it",
        "book the {} for me, I will pay by card",
    ],
    "refund": [
        "I want my money back for the {}", "when do I get the refund for the {}?",
        "please pay me back what the {} cost", "I returned the {}, so where is my money?",
        "you charged me twice for the {}", "refund the {} to my card",
        "the {} was billed but I sent it back", "how do I get reimbursed for the {}?",
        "nobody has repaid me for the {} so far",
        "I sent the {} back and expect to be repaid",
        "a refund for the {} is what I ask for",
        "how long until you return the price of the {}?",
        "you still owe me the amount for the {}",
        "the {} went back to you, now the money should come to me",
        "please reverse the payment for the {}",
        "I paid for the {} and want that sum returned",
    ],
}  # fmt: skip
HELD_OUT: dict[str, list[str]] = {
    "cancel": [
        "could you undo my purchase of the {} before it ships?", "scrap the {} order, thanks",
        "do not bother sending the {}, I found another", "is it too late to abort the {} order?",
    ],
    "complaint": [
        "the {} fell apart the first time I used it", "what a disappointment this {} is",
        "there are scratches all over the {}", "the {} does not do what you promised",
    ],
    "delivery": [
        "any news on the shipment with the {}?", "I am still waiting for the {} to turn up",
        "on which day can I expect the {}?", "did the {} leave your warehouse?",
    ],
    "order": [
        "do you have a {} for me? I would pay today", "get me another {} like the last one",
        "I am interested in purchasing the {}", "reserve a {} under my name, please",
    ],
    "refund": [
        "the price of the {} has not come back to my account", "give me back what I paid for the {}",
        "I expect full repayment for the {}", "my bank shows no credit for the {} yet",
    ],
}  # fmt: skip
ITEMS = (
    ["lamp", "kettle", "desk chair", "rucksack", "toaster", "alarm clock", "wool blanket", "garden hose"],
    ["tea pot", "bicycle pump", "bookshelf", "raincoat", "frying pan", "headphones case", "tent"],
)
OPENINGS = (
    ["", "", "Hello, ", "Hi there, ", "Good morning, ", "Dear team, "],
    ["", "", "Hey, ", "Greetings, ", "To whom it may concern: "],
)


def rows(sentences: dict[str, list[str]], part: int, count: int, seed: int) -> list[dict[str, str]]:
    """Return the same number of rows for each label, none twice."""
    rng = random.Random(seed)
    made = []
    for label, ways in sentences.items():
        found = list(itertools.product(OPENINGS[part], ways, ITEMS[part]))
        for opening, way, item in rng.sample(sorted(set(found)), count // len(sentences)):
            text = opening + way.format(item)
            made.append({"text": text[0].upper() + text[1:], "label": label})
    rng.shuffle(made)
    return made


def main() -> None:
    for name, sentences, part, count in (
        ("train", TRAIN, 0, TRAIN_ROWS),
        ("heldout", HELD_OUT, 1, HELD_OUT_ROWS),
    ):
        lines = [json.dumps(row) + "\n" for row in rows(sentences, part, count, seed=part)]
        path = HERE / f"intents.{name}.jsonl"
        path.write_text("".join(lines))
        print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main()
