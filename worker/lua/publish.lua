#!lua flags=allow-oom
-- Publishes the state of a worker, and forgets the workers that published none for an hour.
-- Runs even if the server is out of memory, as renew does: without it, clients would get the error that no worker runs.
-- A worker whose state has lapsed, as in an outage, or because the clock has jumped, notes that the others' may have too:
-- until they have had time to publish it again, `claim` ends no job for want of a worker that serves its model.
-- KEYS what the worker publishes, workers, then for each of its lanes what it serves
-- ARGV name, what it publishes, its time to live and that of what it serves in milliseconds, number of names of models,
--      these names, then the digests of its models' descriptors
-- returns the digests of descriptors that are not stored; if there are any, it publishes nothing
local now, first = clock(), tonumber(ARGV[5]) + 6
local missing = {}
for i = first, #ARGV do
  if redis.call('PEXPIRE', 'ncml:descriptor:' .. ARGV[i], ARGV[3]) == 0 then missing[#missing + 1] = ARGV[i] end
end
if #missing > 0 then return missing end
if redis.call('EXISTS', KEYS[1]) == 0 and redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  redis.call('SET', 'ncml:settling', 1, 'PX', ARGV[4])
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 3600)
for k = 3, #KEYS do
  redis.call('DEL', KEYS[k])
  for i = 6, first - 1, 1000 do redis.call('SADD', KEYS[k], unpack(ARGV, i, math.min(i + 999, first - 1))) end
  redis.call('PEXPIRE', KEYS[k], ARGV[4])
end
return missing
