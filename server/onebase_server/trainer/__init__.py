"""The trainer process: attaches the engine's base, trains one adapter on it, and ends."""
