"""Names of a model's tensors in llama.cpp, and the order in which it expects the rows of some.

They follow its `conversion/llama.py` and `conversion/qwen.py` (https://github.com/ggml-org/llama.cpp, MIT):
for Llama's architecture the rows of q and k are laid out for another form of the rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from onebase_adapters.export.base_files import BaseFiles, ExportError

_ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "MixtralForCausalLM": "LLAMA",
    "OlmoeForCausalLM": "OLMOE",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
}
"""Names in gguf.MODEL_ARCH, by transformers' class."""


@dataclass(frozen=True)
class GgufNames:
    """The names in GGUF for one base. `arch`: a gguf.MODEL_ARCH."""

    arch: Any
    base: BaseFiles
    _map: Any

    @property
    def arch_name(self) -> str:
        """Value of the GGUF key `general.architecture`."""
        import gguf

        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    def of(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers' model. Raises ExportError if GGUF has none."""
        found = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"GGUF has no name for {parameter} of {self.base.architecture}: export it as peft or merged"
            )
        return str(found)

    def of_experts(self, parameter: str) -> tuple[str, ...]:
        """Return the GGUF names of a parameter of experts: of the gate and of what it gates, or of one."""
        import gguf

        kinds = gguf.MODEL_TENSOR
        owner, _, name = parameter.rpartition(".")
        layer = next(part for part in reversed(owner.split(".")) if part.isdigit())
        parts = {
            "gate_up_proj": (kinds.FFN_GATE_EXP, kinds.FFN_UP_EXP),
            "down_proj": (kinds.FFN_DOWN_EXP,),
        }
        return tuple(f"{gguf.TENSOR_NAMES[kind].format(bid=layer)}.weight" for kind in parts[name])

    def rows(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight, a bias or the B of a LoRA, [rows, ...], with its rows in llama.cpp's order."""
        config, module = self.base.text_config, parameter.rpartition(".")[0].rpartition(".")[2]
        if self.arch_name != "llama" or module not in ("q_proj", "k_proj"):
            return tensor
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def names_of(base: BaseFiles) -> GgufNames:
    """Return the names for a base. Raises ExportError if its architecture is not supported."""
    import gguf

    arch = _ARCHITECTURES.get(base.architecture)
    if arch is None:
        raise ExportError(
            f"{base.architecture} is not among the architectures that are written as GGUF "
            f"({', '.join(_ARCHITECTURES)}). Export it as merged, or as peft, and convert that with "
            "llama.cpp's own convert_hf_to_gguf.py or convert_lora_to_gguf.py"
        )
    found = getattr(gguf.MODEL_ARCH, arch)
    return GgufNames(found, base, gguf.get_tensor_name_map(found, base.text_config.num_hidden_layers))
