"""The pages of a report, on a study, a trial and several studies, and what is written of them."""
