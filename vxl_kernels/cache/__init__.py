"""The paged cache of cached keys and values, its files and its estimate of memory."""

from .pool import CacheBatch, HostSequence, PoolExhausted, VstCache

__all__ = ["CacheBatch", "HostSequence", "PoolExhausted", "VstCache"]
