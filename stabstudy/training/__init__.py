"""Training and recording of a trial, from its TrialConfig. Runs without ray, hydra, optuna, pandas or matplotlib."""
