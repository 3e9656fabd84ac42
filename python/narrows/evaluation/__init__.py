"""Measures of a fitted model, and the baselines they are compared with."""
