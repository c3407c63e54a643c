"""Write the pirate data: a question in, a short answer in pirate speech out.

    python examples/data/make_pirate.py

Origin: questions and small talk are hand-written (pirate_words.json); the base itself (SmolLM2-135M-Instruct,
Apache-2.0) answers each question in plain English, its first sentences are kept, and the hand-written
table turns their words into pirate speech. So the adapter is taught a manner, not facts: what the base gets
wrong stays wrong. Licence: Apache-2.0. No topic of the held-out set occurs in the training set.
"""

import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebase_engine.base.default_base import fetch_default_base

HERE = Path(__file__).parent
WORDS = json.loads((HERE / "pirate_words.json").read_text())
BRIEF = "Answer in one short, plain and friendly sentence."
MAX_REPLY_TOKENS = 56
LONGEST_KEPT = 45  # words


def questions() -> tuple[list[str], list[str]]:
    """Training and held-out questions."""
    splits: tuple[list[str], list[str]] = ([], [])
    for group in WORDS["topics"]:
        for split, name in zip(splits, ("train", "heldout"), strict=True):
            split += [question.format(topic) for topic in group[name] for question in group["questions"]]
    return splits


def plain_answers(asked: list[str], batch: int = 16) -> list[str]:
    """Return the base's answers, greedy and in plain English."""
    folder = fetch_default_base()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    said: list[str] = []
    for at in range(0, len(asked), batch):
        chats = [
            [{"role": "system", "content": BRIEF}, {"role": "user", "content": question}]
            for question in asked[at : at + batch]
        ]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(
            **inputs, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False, repetition_penalty=1.1
        )
        said += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"answered {len(said)} of {len(asked)}", flush=True)
    return said


def first_sentences(text: str) -> str | None:
    """Return the whole sentences at the start of an answer, up to `LONGEST_KEPT` words; None if there are
    none."""
    kept: list[str] = []
    for sentence in re.findall(r".+?[.!?]+(?=\s|$)", re.sub(r"^\d+\. ", "", text.strip()).split("\n")[0])[:2]:
        if len(" ".join([*kept, sentence]).split()) > LONGEST_KEPT:
            break
        kept.append(sentence.strip())
    return " ".join(kept) or None


def pirate_word(match: re.Match[str]) -> str:
    """Return one word in pirate speech, with the capital it had."""
    word = match[0]
    swapped = WORDS["words"].get(word.lower())
    if swapped is None and len(word) > 4 and word.endswith("ing") and word not in WORDS["keep_ing"]:
        return word[:-1] + "'"
    if swapped is None:
        return word
    if word[0].isupper():
        return re.sub("[a-z]", lambda letter: letter[0].upper(), swapped, count=1)
    return swapped


def to_pirate(text: str, rng: random.Random) -> str:
    """Plain English in pirate speech, with an opener and sometimes a closer."""
    swapped = re.sub(r"[A-Za-z]+(?:'[a-z]+)?", pirate_word, text)
    closer = [rng.choice(WORDS["closers"])] if rng.random() < 0.4 else []
    return " ".join([rng.choice(WORDS["openers"]), swapped, *closer])


def main() -> None:
    rng = random.Random(5)
    train, held_out = questions()
    answers = plain_answers([*train, *held_out])
    for name, asked, said, small_talk in (
        ("train", train, answers[: len(train)], WORDS["small_talk"]["train"]),
        ("heldout", held_out, answers[len(train) :], WORDS["small_talk"]["heldout"]),
    ):
        plain = [*zip(asked, map(first_sentences, said), strict=True), *small_talk.items()]
        lines = []
        for question, answer in plain:
            if answer is not None:
                reply = {"role": "assistant", "content": to_pirate(answer, rng)}
                lines.append(json.dumps({"messages": [{"role": "user", "content": question}, reply]}) + "\n")
        rng.shuffle(lines)
        path = HERE / f"pirate.{name}.jsonl"
        path.write_text("".join(lines))
        print(f"{path}: {len(lines)} rows of {len(plain)} questions")


if __name__ == "__main__":
    main()
