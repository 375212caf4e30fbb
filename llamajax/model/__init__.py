"""Flax NNX modules for one sequence: no batch axis anywhere; a batch is `jax.vmap` of them.

Axes: L layers, T query positions, S cache positions, D model, N heads, K kv heads, G = N / K, H head, F feed-forward,
V vocabulary; B rows, in the engine only.

A module built from a configuration is a structure: its parameters are shapes until weights are put in place.
"""
