"""Tokenizers and chat templates: text to token ids and back. Knows no model, and never imports jax."""
