"""Endpoints."""

RIGHT: list = []
WRONG: dict = {}
