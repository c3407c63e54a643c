"""What llama.cpp calls the tensors of a model, and in which order it wants the rows of some.

As its `conversion/llama.py` and `conversion/qwen.py` have it (https://github.com/ggml-org/llama.cpp, MIT):
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
}
"""By transformers' class: gguf.MODEL_ARCH."""


@dataclass(frozen=True)
class Names:
    """The names in GGUF for one base. `arch`: a gguf.MODEL_ARCH."""

    arch: Any
    base: BaseFiles
    _map: Any

    @property
    def arch_name(self) -> str:
        """As `general.architecture` has it."""
        import gguf

        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    def of(self, parameter: str) -> str:
        """The name of a parameter of transformers' model. Raises ExportError where GGUF has none."""
        found = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"GGUF has no name for {parameter} of {self.base.architecture}: export it as peft or merged"
            )
        return str(found)

    def rows(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """A weight, a bias or the B of a LoRA, [rows, ...], with its rows where llama.cpp expects them."""
        config, module = self.base.text_config, parameter.rpartition(".")[0].rpartition(".")[2]
        if self.arch_name != "llama" or module not in ("q_proj", "k_proj"):
            return tensor
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def names_of(base: BaseFiles) -> Names:
    """Raises ExportError for an architecture that is not known here."""
    import gguf

    arch = _ARCHITECTURES.get(base.architecture)
    if arch is None:
        raise ExportError(
            f"{base.architecture} is not among the architectures that are written as GGUF "
            f"({', '.join(_ARCHITECTURES)}). Export it as merged, or as peft, and convert that with "
            "llama.cpp's own convert_hf_to_gguf.py or convert_lora_to_gguf.py"
        )
    found = getattr(gguf.MODEL_ARCH, arch)
    return Names(found, base, gguf.get_tensor_name_map(found, base.text_config.num_hidden_layers))
