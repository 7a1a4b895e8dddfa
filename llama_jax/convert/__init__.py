"""Llama checkpoints of other formats: Meta, Hugging Face, GGUF, llama2.c; read and written in pieces, without torch."""
