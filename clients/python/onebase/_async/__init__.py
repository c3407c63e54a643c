"""The asynchronous client, written by hand. `tools/generate_sync.py` makes `_sync` from it."""
