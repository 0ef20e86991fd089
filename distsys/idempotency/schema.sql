-- The tables that ensure_schema() creates, in one transaction; safe to run again. The constraints carry the invariants.
CREATE SEQUENCE IF NOT EXISTS distsys_idempotency_fence;

-- A row with an answer is done, one whose lease is over is unknown, any other is running. There are few checks, because
-- each costs an INSERT as much as an index does.
CREATE TABLE IF NOT EXISTS distsys_idempotency (
  scope        text        NOT NULL,  -- whose key it is
  endpoint     text        NOT NULL,
  key          text        NOT NULL,
  fingerprint  bytea       NOT NULL,
  fence        bigint      NOT NULL DEFAULT nextval('distsys_idempotency_fence'),
  leased_until timestamptz,           -- NULL: until its transaction ends; 'epoch': its owner said that the outcome is unknown
  request      json,                  -- only for an operation in steps, until it is done
  answer       bytea,
  expires_at   timestamptz NOT NULL,
  PRIMARY KEY (scope, endpoint, key),
  CHECK (answer IS NULL OR leased_until IS NULL)
);
CREATE INDEX IF NOT EXISTS distsys_idempotency_expires ON distsys_idempotency (expires_at);
CREATE INDEX IF NOT EXISTS distsys_idempotency_orphans ON distsys_idempotency (endpoint, fence)
  WHERE request IS NOT NULL;

CREATE TABLE IF NOT EXISTS distsys_steps (
  scope    text NOT NULL,
  endpoint text NOT NULL,
  key      text NOT NULL,
  step     text NOT NULL,
  result   json NOT NULL,
  PRIMARY KEY (scope, endpoint, key, step),
  FOREIGN KEY (scope, endpoint, key) REFERENCES distsys_idempotency ON DELETE CASCADE
);

CREATE TABLE IF NOT EXISTS distsys_processed (
  consumer_group text        NOT NULL,
  source         text        NOT NULL,
  message_id     text        NOT NULL,
  processed_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (consumer_group, source, message_id)
);
CREATE INDEX IF NOT EXISTS distsys_processed_at ON distsys_processed (processed_at);

CREATE TABLE IF NOT EXISTS distsys_failures (
  consumer_group text        NOT NULL,
  source         text        NOT NULL,
  message_id     text        NOT NULL,
  attempts       integer     NOT NULL CHECK (attempts > 0),
  error          text        NOT NULL,
  message        text        NOT NULL,
  parked_at      timestamptz,         -- when it was given up, for somebody to look at
  PRIMARY KEY (consumer_group, source, message_id)
);
