"""Measures: how fast the strategies are (the work, the runs, what their times mean, plots of it), and how well a model
predicts a text. Knows nothing of a terminal."""
