"""A needle in a haystack: the task, its training, the trained weights."""
