"""From logs of other trainers to trials of a study; no torch, no ray, no pandas."""
