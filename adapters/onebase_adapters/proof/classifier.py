"""transformers' own classifier over PEFT's model of a version: the reference of a head and its classes."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from onebase_adapters.format.config import CLASSIFIER_NAMES, AdapterFormatError, Task
from onebase_engine.lora.weights import Head


def classifier_of(reference: nn.Module, task: Task, head: Head) -> nn.Module:
    """The classifier that transformers has for the base, with PEFT's layers and the version's head.

    Args:
        reference: PEFT's model of the version, on a view of the base.

    Raises:
        AdapterFormatError: transformers has none for this base, or one with another kind of head.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    adapted: Any = reference
    full = adapted.get_base_model()
    config = copy.deepcopy(full.config)
    config.num_labels = len(head.weight)
    # Of a row alone the last token is what is classified.
    config.pad_token_id = config.get_text_config().pad_token_id = None
    try:
        with init_empty_weights():
            model = kind.from_config(config)
    except (ValueError, AttributeError) as error:
        raise AdapterFormatError(
            "unsupported_kind",
            f"task_type is {task}, and transformers has no such model for {config.model_type}",
        ) from error
    names = [name for name in CLASSIFIER_NAMES if isinstance(getattr(model, name, None), nn.Linear)]
    if not names or not hasattr(model, model.base_model_prefix):
        raise AdapterFormatError(
            "unsupported_kind", f"task_type is {task}, and {type(model).__name__} has another kind of head"
        )
    name = names[0]
    if (getattr(model, name).bias is None) != (head.bias is None):
        raise AdapterFormatError(
            "bad_shape",
            f"{type(model).__name__} has a classifier {'with' if head.bias is None else 'without'} a bias",
        )
    layer = nn.Linear(head.weight.shape[1], len(head.weight), bias=head.bias is not None, device="meta")
    device = next(full.parameters()).device
    layer.weight = nn.Parameter(head.weight.to(device), requires_grad=False)
    if head.bias is not None:
        layer.bias = nn.Parameter(head.bias.to(device), requires_grad=False)
    setattr(model, name, layer)
    setattr(model, model.base_model_prefix, full.base_model)
    return model.eval()  # type: ignore[no-any-return]
