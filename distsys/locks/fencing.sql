-- One sequence gives fencing tokens, one table remembers the newest token seen for each guarded resource.
SELECT pg_advisory_xact_lock(hashtext('distsys_fence'));  -- IF NOT EXISTS alone fails when two create at once
CREATE SEQUENCE IF NOT EXISTS distsys_fence_token AS bigint;

CREATE TABLE IF NOT EXISTS distsys_fence (
    resource text PRIMARY KEY,
    token    bigint NOT NULL CHECK (token > 0)
);
