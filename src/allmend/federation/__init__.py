"""Training together: strategies, engines that carry their messages, rounds, and layers of privacy."""
