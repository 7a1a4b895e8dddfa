"""Is an answer right? Pure Python, used by evaluation and by rewards."""
