"""Decoders of video files."""
