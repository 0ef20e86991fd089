"""Circuit breaker, retry and bulkhead: each alone as a decorator, all three composed as `resilient`."""
