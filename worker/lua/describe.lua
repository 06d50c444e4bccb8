#!lua flags=allow-oom
-- Stores descriptors of models, as publish does: without them, clients would get the error that no worker serves one.
-- KEYS descriptors; ARGV their time to live in milliseconds, then each of them
for k = 1, #KEYS do redis.call('SET', KEYS[k], ARGV[k + 1], 'PX', ARGV[1]) end
