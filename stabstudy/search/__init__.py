"""Strategies that choose what to train next from the trials on disk; a launch asks again after each round."""
