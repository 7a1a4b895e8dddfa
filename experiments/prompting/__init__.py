"""A checkpoint that answers prompts: opened and placed, from a file or in a conversation."""
