"""Ingestion of other trainers' logs as trials of a study; no torch, no ray, no pandas."""
