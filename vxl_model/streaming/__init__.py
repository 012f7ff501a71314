"""Many windows into a cache."""
