"""Frames of video files. Nothing here knows the model."""
