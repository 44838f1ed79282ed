"""Scorers of pictures: identity preservation (IP), prompt consistency (PC), and further columns."""
