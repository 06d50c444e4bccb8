#!lua flags=allow-oom
-- Publishes the state of a worker, and forgets the workers that published none for an hour.
-- Runs even if the server is out of memory, as renew does: without it, clients would get the error that no worker runs.
-- KEYS what the worker publishes, workers, then for each of its lanes what it serves
-- ARGV name, what it publishes, its time to live and that of what it serves in milliseconds, then the models it serves
local now = clock()
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 3600)
for k = 3, #KEYS do
  redis.call('DEL', KEYS[k])
  for i = 5, #ARGV, 1000 do redis.call('SADD', KEYS[k], unpack(ARGV, i, math.min(i + 999, #ARGV))) end
  redis.call('PEXPIRE', KEYS[k], ARGV[4])
end
