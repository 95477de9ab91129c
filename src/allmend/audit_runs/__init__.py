"""Audits from end to end: of a run, of a model made elsewhere, of a member's own records, and of runs side by side."""
