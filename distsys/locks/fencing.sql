-- One sequence gives fencing tokens, one table remembers the newest token seen for each guarded resource.
CREATE SEQUENCE IF NOT EXISTS distsys_fence_token AS bigint;

CREATE TABLE IF NOT EXISTS distsys_fence (
    resource text PRIMARY KEY,
    token    bigint NOT NULL CHECK (token > 0)
);
