"""TRL's AsyncGRPO, as it is installed, against the server at URL: `python async_grpo.py URL BASE FOLDER`.

Some steps of a LoRA that is rewarded for tokens with odd ids; the last line printed is the trainer's log as
JSON.
What TRL asks of a machine with GPUs is replaced: FlashAttention, by PyTorch's; the check that vLLM is there,
of which the trainer uses nothing; and the question for the GPU's speed. TRL's own is what speaks to the
server.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch

STEPS = 12
random.seed(0)  # TRL's rollout process draws its samples' seeds, and imports this file


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward, of which the test's base gets a quarter: TRL's rollout process imports it from here."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


class PlainAttention:
    """FlashAttention's function over sequences that lie one after the other, [tokens, heads, size]."""

    @staticmethod
    def flash_attn_varlen_func(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        starts_q: torch.Tensor, starts_k: torch.Tensor, *_: Any, softmax_scale: float, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        made = []
        for row in range(len(starts_q) - 1):
            queries = query[starts_q[row] : starts_q[row + 1]].transpose(0, 1)
            keys, values = (part[starts_k[row] : starts_k[row + 1]].transpose(0, 1) for part in (key, value))
            seen = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(
                keys.shape[1] - queries.shape[1]
            )
            one = torch.nn.functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], seen, scale=softmax_scale, enable_gqa=True
            )
            made.append(one[0].transpose(0, 1))
        return torch.cat(made)


def main(url: str, base: str, folder: str) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.async_grpo import (
        AsyncGRPOConfig,
        AsyncGRPOTrainer,
        async_grpo_trainer,
        async_rollout_worker,
        packing,
    )

    packing._flash_attn = PlainAttention
    async_rollout_worker.is_vllm_available = lambda: True
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    prompts = [[{"role": "user", "content": f"Name {number} towns."}] for number in range(2)]
    trainer = AsyncGRPOTrainer(
        model=base,
        reward_funcs=odd,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=AsyncGRPOConfig(
            output_dir=folder, vllm_server_base_url=url, max_steps=STEPS, per_device_train_batch_size=16,
            gradient_accumulation_steps=1, num_generations=8, max_completion_length=8, max_staleness=1,
            max_inflight_tasks=16, top_k=8, learning_rate=4e-3, dtype="float32", logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            token_budget=0,
        ),
    )  # fmt: skip
    trainer.train()
    print(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
