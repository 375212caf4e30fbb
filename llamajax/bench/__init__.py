"""Measures the strategies: the work, the runs, what their times mean, and plots of it. Knows nothing of a terminal."""
