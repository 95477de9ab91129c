"""Who works with whom: the graph of members that CoBo finds while they train, and what it makes of their models.

Source: Hashemi, He, Jaggi, "CoBo: Collaborative Learning via Bilevel Optimization", arXiv 2409.05539, NeurIPS 2024.
"""
