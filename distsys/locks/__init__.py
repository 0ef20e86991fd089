"""Distributed locks: who may enter, for how long, and what refuses the one who comes back too late."""
