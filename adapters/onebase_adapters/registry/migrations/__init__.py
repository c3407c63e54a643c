"""The registry's schema, step by step. `Registry.migrate` runs what is missing."""
