"""Idempotency: one effect per intent, whatever crashes; for functions, HTTP requests, transactions and messages."""
