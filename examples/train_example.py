"""Train one of the example adapters on the NF4 base, from top to bottom.

    python examples/train_example.py orders
    python examples/train_example.py pirate

It reads examples/data/<name>.train.jsonl and writes examples/adapters/<name>/ as PEFT does, in bfloat16.
Ten minutes or so on two CPU cores. Figures: `python examples/evaluate_example.py <name>`.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from onebase_adapters.default_base import DEFAULT_REPO, fetch_default_base

EXAMPLES = Path(__file__).parent
IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """What differs between the examples. Alpha is twice the rank, so the scale is 2."""

    targets: tuple[str, ...]
    rank: int
    learning_rate: float
    epochs: int
    batch: int = 16


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECIPES = {
    "orders": Recipe(ATTENTION, rank=16, learning_rate=1e-3, epochs=1),
    "pirate": Recipe((*ATTENTION, "gate_proj", "up_proj", "down_proj"), rank=8, learning_rate=5e-4, epochs=3),
}


def load_base(folder: Path) -> torch.nn.Module:
    """The base as it is served: NF4 with double quantization, computing in bfloat16."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": device},
        local_files_only=True,
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Or the first forward repacks the weight in place, into a layout that has no backward.
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def encode(tokenizer, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation: the loss is on the reply and its end-of-turn token."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError("the chat template renders the prompt differently once there is a reply")
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # the template adds a newline after it
    return whole[:end], [IGNORE] * len(prompt) + whole[len(prompt) : end]


def pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors `[rows, longest]`; padding is neither attended to nor in the loss."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows]),
    }


def summed_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the supervised tokens, in nats, and how many there are."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = batch["labels"][:, 1:].to(causal.device)
    hidden = causal.model(
        input_ids=batch["input_ids"].to(causal.device),
        attention_mask=batch["attention_mask"].to(causal.device),
    ).last_hidden_state[:, :-1]
    supervised = labels != IGNORE
    logits = causal.lm_head(
        hidden[supervised]
    ).float()  # only where they count: [supervised tokens, vocabulary]
    return torch.nn.functional.cross_entropy(logits, labels[supervised], reduction="sum"), int(
        supervised.sum()
    )


def read_rows(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a JSON lines file."""
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def batches(rows: list, size: int, rng: random.Random) -> list[list]:
    """Shuffled batches of rows of about the same length, so that little is padding."""
    shuffled = sorted(rng.sample(rows, len(rows)), key=lambda row: len(row[0]) // 8)
    cut = [shuffled[at : at + size] for at in range(0, len(shuffled), size)]
    return rng.sample(cut, len(cut))


def save(model, folder: Path) -> None:
    """Write the adapter as PEFT does, but its tensors as bfloat16: half the size, loaded as fp32 again."""
    model.peft_config["default"].base_model_name_or_path = DEFAULT_REPO
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:  # PEFT also writes a README.md, over ours
        written = Path(temporary)
        model.save_pretrained(written, save_embedding_layers=False)
        shutil.copyfile(written / "adapter_config.json", folder / "adapter_config.json")
        tensors = safetensors.torch.load_file(written / "adapter_model.safetensors")
    safetensors.torch.save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an example adapter on the NF4 base.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--base", type=Path, help="folder of the base (default: the default base)")
    parser.add_argument("--out", type=Path, help="default: examples/adapters/<name>")
    parser.add_argument("--max-steps", type=int, help="stop early, to try things out")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    recipe = RECIPES[args.name]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    # The base, frozen, and a LoRA adapter in fp32 on its target layers.
    folder = args.base or fetch_default_base(lambda message, _: print(message))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=list(recipe.targets),
    )
    model = get_peft_model(load_base(folder), config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(w.numel() for w in weights):,} trainable parameters, {weights[0].dtype}")

    # The data: every row tokenized once.
    rows = [
        encode(tokenizer, messages) for messages in read_rows(EXAMPLES / "data" / f"{args.name}.train.jsonl")
    ]
    plan = [batch for _ in range(recipe.epochs) for batch in batches(rows, recipe.batch, rng)][
        : args.max_steps
    ]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / len(plan)))
    )

    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(plan, start=1):
        loss, tokens = summed_loss(model, pad(batch, tokenizer.pad_token_id))
        (loss / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {step}: the gradient is not finite; try a lower learning rate")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == len(plan):
            seconds = time.perf_counter() - started
            print(f"step {step}/{len(plan)}  loss {loss.item() / tokens:.4f}  {seconds:.0f} s", flush=True)

    out = args.out or EXAMPLES / "adapters" / args.name
    save(model, out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
