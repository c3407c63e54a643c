# Generated from _async/__init__.py by tools/generate_sync.py; do not edit.
"""The synchronous client. `tools/generate_sync.py` makes it from `_async`."""
