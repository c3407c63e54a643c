"""A second module tree over the base's own tensors: other modules, the same memory."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from onebase_adapters.base import base_tensors

Model = TypeVar("Model", bound=nn.Module)


def view(base: Model) -> Model:
    """A deep copy of the module tree that shares every tensor with `base`.

    Parameters, all buffers and the quantization statistics go into deepcopy's memo, so that none is
    copied; configs and module attributes are copies, free to differ. Some 45 ms for 272 tensors.
    """
    shared = {id(tensor): tensor for tensor in base_tensors(base).values()}
    return copy.deepcopy(base, shared)
