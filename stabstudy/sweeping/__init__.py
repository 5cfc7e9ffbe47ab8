"""Launches: trials of a plan trained through Ray Tune or in this process, shown, stopped and resumed."""
