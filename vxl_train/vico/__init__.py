"""VICO: questions about the order of events, made from captions of clips."""
