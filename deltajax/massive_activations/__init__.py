"""Massive activations: measure, fit, predict and control them while a model trains."""
