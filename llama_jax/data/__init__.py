"""From files to rows: tokenizers, documents, packing, mixing, loading."""
