"""Exports of trials to the tracker that a user has: TensorBoard or W&B, each written by its own library."""
