"""A model behind HTTP, as clients of OpenAI's interface expect it."""
