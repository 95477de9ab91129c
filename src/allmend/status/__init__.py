"""How a run stands, for whoever watches it: its log in a few figures, as metrics, and as a page on this machine."""
