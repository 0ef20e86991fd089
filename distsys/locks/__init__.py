"""Distributed locks: one holder at a time, and fences that refuse the late write of an earlier holder."""
