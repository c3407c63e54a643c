"""The OneBase server: one quantized base model and a different LoRA adapter for every request."""

from importlib.metadata import version

__version__ = version("onebase")
SUMMARY = "One 4-bit base model, and every LoRA adapter on it, served without a restart."
