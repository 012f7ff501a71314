"""Parts of machine_code.py: GPU machine code parsed, counted and held to limits."""
