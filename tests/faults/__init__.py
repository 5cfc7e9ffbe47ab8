"""Fault injection: kills, full disks, damaged files and bad words, each counted, and what must hold after each."""
