"""From a plan to trained trials: through Ray Tune or in this process, shown, stopped and resumed."""
