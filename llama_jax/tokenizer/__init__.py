"""Text to ids and back: tokenizers of every format, their files, their training, and chat formats."""
