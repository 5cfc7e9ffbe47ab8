"""The figures of a report, a file for each family: drawing, caption, numbers, and when it is absent."""
