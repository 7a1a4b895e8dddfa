"""An OpenAI-compatible server: a web application around one generator, which runs in a thread of its own."""
