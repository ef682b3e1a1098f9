// A realtime-js of about 18 months before the newest, by itself: it gets the endpoint, and its token by `setAuth`.
// It is 2.11.7 because 2.11.9 to 2.11.15 forget their channels when they reconnect, whatever the server does.
import { RealtimeClient } from 'realtime-js-older'
import ws from 'ws'
import { play } from './scenarios.mjs'

await play(async (url, key, token, params = {}) => {
  const client = new RealtimeClient(`${url}/realtime/v1`, { params: { apikey: key, ...params }, transport: ws })
  if (token) await client.setAuth(token)
  return client
}, { tries: false })
