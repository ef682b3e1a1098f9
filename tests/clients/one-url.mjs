// A todo app on the newest supabase-js with one address for logins, rows and changes: the relay's. The server behind it
// answers as auth and REST would; it has no paths of realtime.
import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import { createClient } from '@supabase/supabase-js'
import ws from 'ws'
import { Inbox, RELAY, order, run, token, write } from './harness.mjs'

const ALICE = 'aaaaaaaa-0000-4000-8000-000000000001'

/** Logs in everybody as alice, and keeps the notes in the database of the relay. */
async function answer(request, response) {
  const url = new URL(request.url, 'http://behind')
  const body = (await request.toArray()).join('')
  const send = (status, value, headers = {}) => {
    response.writeHead(status, { 'content-type': 'application/json', ...headers })
    response.end(value === undefined ? '' : JSON.stringify(value))
  }
  if (url.pathname === '/auth/v1/token') {
    assert.equal(JSON.parse(body).email, 'alice@example.com')
    const user = { id: ALICE, aud: 'authenticated', email: 'alice@example.com' }
    const access_token = await token('alice')
    return send(200, { access_token, token_type: 'bearer', expires_in: 3600, refresh_token: 'r', user })
  }
  if (url.pathname === '/rest/v1/notes' && request.method === 'POST') {
    assert.match(request.headers.authorization, /^Bearer /)
    const { id, title } = JSON.parse(body)
    if (title === '') return send(409, { code: '23514', message: 'a title is expected', details: null, hint: null })
    await write(`insert into notes (id, owner, title) values (${id}, '${ALICE}', '${title}')`)
    return send(201)
  }
  if (url.pathname === '/rest/v1/notes' && request.method === 'GET') {
    return send(200, [{ id: 1, title: 'first' }], { 'content-range': '0-0/1' })
  }
  return send(404, { message: `nothing at ${request.method} ${request.url}` })
}

await run({
  async a_todo_app_has_one_address_for_logins_rows_and_changes() {
    const behind = createServer((request, response) => answer(request, response).catch((error) => response.destroy(error)))
    await new Promise((listening) => behind.listen(0, '127.0.0.1', listening))
    await order('STOP')
    await order(`BEHIND http://127.0.0.1:${behind.address().port}`)
    const client = createClient(RELAY, 'sb_publishable_for_tests', { realtime: { transport: ws }, auth: { persistSession: false } })
    const login = await client.auth.signInWithPassword({ email: 'alice@example.com', password: 'x' })
    assert.equal(login.error, null)
    assert.equal(login.data.user.id, ALICE)
    const [changes, statuses] = [new Inbox('changes'), new Inbox('statuses')]
    client
      .channel('todos')
      .on('postgres_changes', { event: '*', schema: 'public', table: 'notes' }, (change) => changes.put(change))
      .on('system', {}, ({ message }) => statuses.put(message))
      .subscribe()
    await statuses.until((message) => message === 'Subscribed to PostgreSQL')
    const { data, count } = await client.from('notes').select('id, title', { count: 'exact' })
    assert.deepEqual([data, count], [[{ id: 1, title: 'first' }], 1])
    assert.equal((await client.from('notes').insert({ id: 2, title: 'second' })).error, null)
    const { eventType, new: row } = await changes.next()
    assert.deepEqual([eventType, row.id, row.title], ['INSERT', 2, 'second'])
    const refused = await client.from('notes').insert({ id: 3, title: '' })
    assert.deepEqual([refused.status, refused.error.code], [409, '23514'])
    const other = await client.functions.invoke('missing')
    assert.equal(other.error.context.status, 404)
  },
})
