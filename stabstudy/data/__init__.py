"""From text to batches: what to read (sources), tokens on disk (tokens), which tokens in which step (batches)."""
