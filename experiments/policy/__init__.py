"""A model that is sampled and judged: candidates that are kept, or a policy that is trained on its own answers."""
