"""Runs a model for requests of token ids: the jitted steps, the runner that owns the device's state, and the
strategies. Knows nothing of text or files."""
