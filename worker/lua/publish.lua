#!lua flags=allow-oom
-- Publishes the state of a worker, and forgets the workers that published none for an hour.
-- Runs even if the server is out of memory, as renew does: without it, clients would get the error that no worker runs.
-- KEYS what the worker publishes, workers; ARGV name, what it publishes, its time to live in milliseconds
local now = clock()
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 3600)
