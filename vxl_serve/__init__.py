"""Watched videos for other programs: an engine that answers many questions, a server, vLLM."""
