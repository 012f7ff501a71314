"""Parts of attn.py."""
