"""Real engines on tiny models, stepped in the test's own process."""
