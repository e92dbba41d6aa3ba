"""Operators that a per-channel map travels through."""
