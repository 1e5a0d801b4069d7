-- Keeps a worker's record alive, fenced by its epoch; a repeated call adds nothing.
-- KEYS: worker record, highest epoch of this worker id, members stream
-- ARGV: epoch, record TTL ms, epoch TTL ms, incarnation, field, value, ...
-- Returns the highest epoch known. If it is above ours, or ours with another incarnation
-- (returned as epoch + 1), nothing was written.
local epoch = tonumber(ARGV[1])
local highest = tonumber(redis.call('GET', KEYS[2]) or '0')
if highest > epoch then
  return highest
end
local held = redis.call('HMGET', KEYS[1], 'epoch', 'incarnation')
if held[1] and tonumber(held[1]) == epoch and held[2] ~= ARGV[4] then
  return epoch + 1
end
if not held[1] or tonumber(held[1]) ~= epoch then
  redis.call('DEL', KEYS[1])
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', '1000', '*', 'event', 'join', 'worker', KEYS[1])
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
local fields = {'epoch', ARGV[1], 'incarnation', ARGV[4]}
for index = 5, #ARGV do
  fields[#fields + 1] = ARGV[index]
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return epoch
