"""Operators that swallow a per-channel map into their constants."""
