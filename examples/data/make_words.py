"""Make tasks of reinforcement: descriptions of a given number of words, and the grader that counts them."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
WORDS, HELD_OUT = 3, 8
THINGS = """
    a cat,the sea,a car,music,bread,the moon,a walk,winter,a bicycle,tea,an old house,the forest,a letter,
    rain,a teacher,the market,a dream,coffee,a river,the city,snow,a garden,a train,a friend,the night,
    a book,summer,a mountain,a lamp,the wind,a clock,fire
"""
SOURCE = """\
def grade(sample, item):
    words = sample["output_text"].split()
    return 1 / (1 + abs(len(words) - item["words"]))
"""


def main() -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"Describe {thing.strip()} in exactly three words."}],
            "words": WORDS,
        }
        for thing in THINGS.split(",")
    ]
    for name, part in (("train", rows[:-HELD_OUT]), ("heldout", rows[-HELD_OUT:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (FOLDER / f"words.{name}.jsonl").write_text(text)
        print(f"{FOLDER.name}/words.{name}.jsonl: {len(part)} prompts")
    grader = {"type": "python", "name": "three words", "source": SOURCE}
    (FOLDER / "words.grader.json").write_text(json.dumps(grader, indent=1) + "\n")


if __name__ == "__main__":
    main()
