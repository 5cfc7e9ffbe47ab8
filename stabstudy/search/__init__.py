"""Adaptive sweeps: what a study trains next, from the trials on disk."""
