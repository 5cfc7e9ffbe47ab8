"""Data, from text to batches: sources, tokens on disk, and the tokens of each step."""
