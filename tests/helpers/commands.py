"""Arguments of commands that more than one file runs in the folder `place` of `cli/conftest.py`."""

QUESTION = "What is shown?"
ASK = ("ask", "--model", "model", "--ratio", "4", "--max-new-tokens", "6")
