// The newest supabase-js. Its tokens come from a callback, which is asked again on `setAuth()`.
import { createClient } from '@supabase/supabase-js'
import ws from 'ws'
import { play } from './scenarios.mjs'

await play(async (url, key, token, params = {}) => {
  let current = token
  const options = { realtime: { transport: ws, params }, ...(token && { accessToken: async () => current }) }
  const client = createClient(url, key, options)
  // Without waiting for the first token the first join would show the key alone.
  if (token) await client.realtime.setAuth()
  return {
    channel: (topic, options) => client.channel(topic, options),
    removeChannel: (channel) => client.removeChannel(channel),
    setAuth: (next) => {
      current = next
      return client.realtime.setAuth(token ? undefined : next)
    },
  }
}, { binary: true })
