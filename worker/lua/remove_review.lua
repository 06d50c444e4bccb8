-- Deletes a review for a model, and what it counts.
-- KEYS reviews, review
-- ARGV owner, id, model
-- returns 1 if there was one
if redis.call('HGET', KEYS[2], 'model') ~= ARGV[3] then return 0 end
redis.call('DEL', KEYS[2])
local prefix = ARGV[1] .. ':' .. ARGV[2] .. ':'
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if string.sub(member, 1, #prefix) == prefix then redis.call('ZREM', KEYS[1], member) end
end
return 1
