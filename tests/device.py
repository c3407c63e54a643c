"""The device of those tests of the engine and of adapters that can run on another one than the CPU.

ONEBASE_TEST_DEVICE=cuda asks for a GPU, as `make gpu-check` does. What holds only on the CPU, PEFT's own
bits for one, other tests ask for.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("ONEBASE_TEST_DEVICE", "cpu"))
