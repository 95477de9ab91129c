"""Members' mixtures once they are trained: who answers in them, and what a plain adapter has of one."""
