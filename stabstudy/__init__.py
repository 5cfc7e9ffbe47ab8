"""stabstudy: which recipes train stably, how spiky each is, why, and what to use. Imports nothing."""
