"""The language model: one window through the layers."""
