"""From words to trials: read what is asked (plan), then train it (launch)."""
