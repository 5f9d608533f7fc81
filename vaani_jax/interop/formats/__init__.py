"""Formats of other tools: each checks, writes and reads."""
