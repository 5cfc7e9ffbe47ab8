"""Studies read back: tables, comparisons, figures, the report page. Imports no torch, ray or hydra."""
