"""What a user passes, as token ids and visual features."""
