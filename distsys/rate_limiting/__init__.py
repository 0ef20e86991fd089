"""Rate limiting: token bucket, sliding window, and several limits decided at once."""
