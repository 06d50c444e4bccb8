-- Writes a key, which fails while the server refuses writes.
-- KEYS probe; returns 'memory' if new jobs are refused for lack of memory, else 'ok'
redis.call('SET', KEYS[1], '1', 'EX', 60)
return short_of_memory() and 'memory' or 'ok'
