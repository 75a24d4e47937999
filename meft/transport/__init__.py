"""Streams, pinned memory, and copies between host and device."""
