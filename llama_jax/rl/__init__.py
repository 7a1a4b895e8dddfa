"""Answers drawn from the present policy, what they are worth, and what is kept or learnt of them."""
