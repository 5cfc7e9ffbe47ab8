"""From a TrialConfig to a trained, fully recorded trial. Runs without ray, hydra, optuna, pandas or matplotlib."""
