"""Measures the strategies, and how well a model predicts a text. Knows nothing of a terminal."""
