"""Parts of prefill.py: whole windows through the language model."""
