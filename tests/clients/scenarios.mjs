// What both JavaScript clients must do. They differ only in how they connect: `connect(url, key, token, parameters)` gives the
// client's `channel` and `removeChannel`, and `setAuth(token)`. Without a token the key is all that they show. One that
// `tries` joins again by itself after a join was refused.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { Inbox, PROXY, RELAY, order, run, token, within, write } from './harness.mjs'

const ALICE = 'aaaaaaaa-0000-4000-8000-000000000001'
const BOB = 'bbbbbbbb-0000-4000-8000-000000000002'
const BOARD = { event: '*', schema: 'public', table: 'board' }
const NOTES = { event: '*', schema: 'public', table: 'notes' }

/** A channel with one binding, or with several by name; what it tells is in its inboxes. */
function listen(client, topic, bindings) {
  const channel = client.channel(topic)
  const [changes, statuses, systems] = ['changes', 'statuses', 'systems'].map((of) => new Inbox(`${topic} ${of}`))
  for (const [name, binding] of Object.entries(bindings.event ? { '': bindings } : bindings)) {
    channel.on('postgres_changes', binding, (change) => changes.put({ ...change, binding: name }))
  }
  channel.on('system', {}, (message) => systems.put(message))
  channel.subscribe((status, error) => statuses.put({ status, error: error?.message }))
  const reaches = (wanted) => statuses.until(({ status }) => status === wanted)
  return { channel, changes, statuses, systems, reaches }
}

async function subscribed(client, topic, bindings) {
  const listening = listen(client, topic, bindings)
  assert.deepEqual(await listening.statuses.next(), { status: 'SUBSCRIBED', error: undefined })
  assert.equal((await listening.systems.next()).message, 'Subscribed to PostgreSQL')
  return listening
}

/** A joined channel without changes: broadcasts, and presence if it has a key. */
async function enter(client, topic, { key, isPrivate, ...broadcast } = {}) {
  const config = { broadcast, ...(isPrivate && { private: true }), ...(key && { presence: { key } }) }
  const channel = client.channel(topic, { config })
  const [messages, statuses, syncs, joins, leaves] = ['messages', 'statuses', 'syncs', 'joins', 'leaves']
    .map((of) => new Inbox(`${topic} ${key ?? ''} ${of}`))
  channel.on('broadcast', { event: '*' }, (message) => messages.put(message))
  if (key) {
    channel.on('presence', { event: 'sync' }, () => syncs.put(present(channel)))
    channel.on('presence', { event: 'join' }, ({ key, newPresences }) => joins.put(`${key} ${newPresences.map(({ n }) => n)}`))
    channel.on('presence', { event: 'leave' }, ({ key, leftPresences }) => leaves.put(`${key} ${leftPresences.map(({ n }) => n)}`))
  }
  channel.subscribe((status, error) => statuses.put({ status, error: error?.message }))
  assert.deepEqual(await statuses.next(), { status: 'SUBSCRIBED', error: undefined })
  const send = (event, payload) => channel.send({ type: 'broadcast', event, payload })
  return { channel, messages, statuses, syncs, joins, leaves, send }
}

/** What each key has tracked, as one text: `ann 1,2 ben 3`. */
function present(channel) {
  const keys = Object.entries(channel.presenceState()).sort(([one], [other]) => (one < other ? -1 : 1))
  return keys.map(([key, metas]) => `${key} ${metas.map(({ n }) => n).sort()}`).join(' ')
}

const sent = (event, payload) => ({ type: 'broadcast', event, payload })

const brief = ({ binding, eventType, new: row, old }) =>
  `${binding} ${eventType} ${row.id ?? old.id}`.trimStart()
const briefs = async (listening, count) => (await listening.changes.take(count)).map(brief)

export const play = (connect, { tries = true, binary = false } = {}) => run({
  async gets_rows_as_they_come_change_and_go() {
    const client = await connect(RELAY, await token('anon'), await token('alice'))
    const notes = await subscribed(client, 'notes', NOTES)
    await write(`insert into notes values (1, '${ALICE}', 'first', 3, true, 12.50, '{a,"b c"}', '{"k": [1, null]}',
      '2026-01-02 03:04:05.678901+00')`)
    const { commit_timestamp: at, ...inserted } = await notes.changes.next()
    const row = {
      id: 1, owner: ALICE, title: 'first', stars: 3, done: true, price: 12.5, tags: ['a', 'b c'],
      details: { k: [1, null] }, due: '2026-01-02T03:04:05.678901+00:00',
    }
    assert.deepEqual(inserted, {
      binding: '', schema: 'public', table: 'notes', eventType: 'INSERT', new: row, old: {}, errors: null,
    })
    assert.ok(Math.abs(Date.now() - Date.parse(at)) < 60_000, at)
    await write(`update notes set title = 'second', price = null`)
    const updated = await notes.changes.next()
    assert.equal(updated.eventType, 'UPDATE')
    assert.deepEqual([updated.new, updated.old], [{ ...row, title: 'second', price: null }, { id: 1 }])
    await write('delete from notes')
    const deleted = await notes.changes.next()
    assert.deepEqual([deleted.eventType, deleted.new, deleted.old], ['DELETE', {}, { id: 1 }])
  },

  async gets_the_whole_old_row_where_replica_identity_is_full() {
    const board = await subscribed(await connect(RELAY, await token('anon')), 'board', BOARD)
    await write(`insert into board values (1, 7, 'a')`)
    await write(`update board set text = 'b'`)
    await write('delete from board')
    const [, updated, deleted] = await board.changes.take(3)
    assert.deepEqual([updated.old, updated.new], [{ id: 1, list: 7, text: 'a' }, { id: 1, list: 7, text: 'b' }])
    assert.deepEqual([deleted.old, deleted.new], [{ id: 1, list: 7, text: 'b' }, {}])
  },

  async gets_by_each_binding_what_its_event_and_filter_say() {
    const on = (event, filter) => ({ ...BOARD, event, filter })
    const board = await subscribed(await connect(RELAY, await token('anon')), 'board', {
      added: on('INSERT', 'list=eq.7'),
      changed: on('UPDATE', 'list=eq.7'),
      removed: on('DELETE', 'list=eq.7'),
      either: on('*', 'text=in.(red,green)'),
      large: on('*', 'id=gt.10'),
      other: on('*', 'list=neq.7'),
    })
    const gives = async (sql, expected) => {
      await write(sql)
      assert.deepEqual((await briefs(board, expected.length)).sort(), expected.sort(), sql)
    }
    await gives(`insert into board values (1, 7, 'blue')`, ['added INSERT 1'])
    await gives(`insert into board values (2, 8, 'red')`, ['either INSERT 2', 'other INSERT 2'])
    await gives(`insert into board values (11, 8, 'blue')`, ['large INSERT 11', 'other INSERT 11'])
    await gives(`update board set text = 'green' where id = 1`, ['changed UPDATE 1', 'either UPDATE 1'])
    await gives(`update board set list = 7 where id = 2`, ['changed UPDATE 2', 'either UPDATE 2'])
    await gives('delete from board where id = 1', ['removed DELETE 1', 'either DELETE 1'])
    await write('update board set list = 9 where id = 11; delete from board where id = 2')
    assert.deepEqual(await briefs(board, 2), ['large UPDATE 11', 'other UPDATE 11'])
    assert.deepEqual((await briefs(board, 2)).sort(), ['either DELETE 2', 'removed DELETE 2'])
  },

  async gets_rows_that_match_one_of_several_conditions() {
    const on = (filter) => ({ ...BOARD, event: '*', filter })
    const board = await subscribed(await connect(RELAY, await token('anon')), 'board', {
      either: on('or=(list.eq.7,text.in.(red,"a, (b)"))'),
      nested: on('id=lt.10,or=(and(list.gt.7,list.lt.9),not.or(text.neq.red,id.neq.1))'),
      neither: on('not.or=(list.eq.7,text.like.%e%)'),
    })
    const gives = async (sql, expected) => {
      await write(sql)
      assert.deepEqual((await briefs(board, expected.length)).sort(), expected.sort(), sql)
    }
    await gives(`insert into board values (1, 7, 'blue')`, ['either INSERT 1'])
    await gives(`insert into board values (2, 8, 'a, (b)')`, ['either INSERT 2', 'nested INSERT 2', 'neither INSERT 2'])
    await gives(`insert into board values (3, 9, 'x')`, ['neither INSERT 3'])
    await gives(`update board set text = 'red', list = 9 where id = 1`, ['either UPDATE 1', 'nested UPDATE 1'])
    await gives(`delete from board where id = 2`, ['either DELETE 2', 'nested DELETE 2', 'neither DELETE 2'])
    const bad = listen(await connect(RELAY, await token('anon')), 'bad', on('or=(list.eq.7,text.foo.red)'))
    assert.match((await bad.systems.next()).message, /Error parsing `filter` params: at character 20, "foo.red\)": an operator/)
  },

  async shows_two_users_only_their_own_rows() {
    const key = await token('anon')
    const alice = await subscribed(await connect(RELAY, key, await token('alice')), 'notes', NOTES)
    const bob = await subscribed(await connect(RELAY, key, await token('bob')), 'notes', NOTES)
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a'), (2, '${BOB}', 'b')`)
    await write(`update notes set stars = 1`)
    await write('delete from notes where id = 1')
    await write(`insert into notes (id, owner, title) values (3, '${ALICE}', 'a')`)
    await write(`update notes set owner = '${BOB}' where id = 3`)
    await write(`insert into notes (id, title) values (9, 'for everybody')`)
    assert.deepEqual(await briefs(alice, 5), ['INSERT 1', 'UPDATE 1', 'DELETE 1', 'INSERT 3', 'INSERT 9'])
    const seen = await bob.changes.take(4)
    assert.deepEqual(seen.map(brief), ['INSERT 2', 'UPDATE 2', 'UPDATE 3', 'INSERT 9'])
    assert.deepEqual(seen[2].old, { id: 3 })
  },

  async sees_other_rows_once_another_token_is_set() {
    const client = await connect(RELAY, await token('anon'), await token('alice'))
    const notes = await subscribed(client, 'notes', NOTES)
    const insert = (id) => write(`insert into notes (id, owner, title)
      values (${id}1, '${ALICE}', 'a'), (${id}2, '${BOB}', 'b'), (${id}9, null, 'for everybody')`)
    await insert(1)
    assert.deepEqual(await briefs(notes, 2), ['INSERT 11', 'INSERT 19'])
    await client.setAuth(await token('bob'))
    assert.equal((await notes.systems.next()).status, 'ok')
    await insert(2)
    assert.deepEqual(await briefs(notes, 2), ['INSERT 22', 'INSERT 29'])
  },

  async is_let_in_by_a_token_that_comes_after_the_join() {
    const client = await connect(RELAY, await token('anon'))
    const notes = listen(client, 'notes', NOTES)
    assert.equal((await notes.systems.next()).status, 'error')
    await client.setAuth(await token('alice'))
    await notes.systems.until(({ status }) => status === 'ok')
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(notes, 1), ['INSERT 1'])
  },

  async keeps_the_rows_when_the_same_user_renews_the_token() {
    const client = await connect(RELAY, await token('anon'), await token('alice', 30))
    const notes = await subscribed(client, 'notes', NOTES)
    await client.setAuth(await token('alice', 3600))
    assert.equal((await notes.systems.next()).status, 'ok')
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(notes, 1), ['INSERT 1'])
  },

  async subscribes_with_an_opaque_key_alone() {
    const board = await subscribed(await connect(RELAY, 'sb_publishable_for_tests'), 'board', BOARD)
    await write(`insert into board values (1, 7, 'a')`)
    assert.deepEqual(await briefs(board, 1), ['INSERT 1'])
    const notes = await subscribed(await connect(RELAY, 'sb_secret_for_tests'), 'notes', NOTES)
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(notes, 1), ['INSERT 1'])
  },

  async gets_changes_again_after_its_socket_was_cut() {
    const client = await connect(PROXY, await token('anon'), await token('alice'))
    const [board, notes] = [await subscribed(client, 'board', BOARD), await subscribed(client, 'notes', NOTES)]
    await order('CUT')
    for (const listening of [board, notes]) {
      await listening.reaches('CHANNEL_ERROR')
      await listening.reaches('SUBSCRIBED')
    }
    await write(`insert into board values (1, 7, 'a')`)
    await write(`insert into notes (id, owner, title) values (1, '${BOB}', 'b'), (2, '${ALICE}', 'a')`)
    assert.deepEqual([await briefs(board, 1), await briefs(notes, 1)], [['INSERT 1'], ['INSERT 2']])
  },

  async gets_changes_again_after_the_relay_was_restarted() {
    const client = await connect(RELAY, await token('anon'), await token('alice'))
    const [board, notes] = [await subscribed(client, 'board', BOARD), await subscribed(client, 'notes', NOTES)]
    await order('STOP')
    for (const listening of [board, notes]) await listening.reaches('CHANNEL_ERROR')
    await order('START')
    for (const listening of [board, notes]) await listening.reaches('SUBSCRIBED')
    await write(`insert into board values (1, 7, 'a')`)
    await write(`insert into notes (id, owner, title) values (1, '${BOB}', 'b'), (2, '${ALICE}', 'a')`)
    assert.deepEqual([await briefs(board, 1), await briefs(notes, 1)], [['INSERT 1'], ['INSERT 2']])
  },

  async misses_nothing_while_the_relay_is_away_when_it_named_its_session() {
    const client = await connect(RELAY, await token('anon'), await token('alice'), { session: randomUUID() })
    const notes = await subscribed(client, 'notes', NOTES)
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    const identity = ({ new: { id }, commit_timestamp: at }) => `${id} ${at}`
    const first = await notes.changes.next()
    await order('STOP')
    await notes.reaches('CHANNEL_ERROR')
    await write(`insert into notes (id, owner, title) values (2, '${ALICE}', 'b'), (3, '${BOB}', 'c'), (4, '${ALICE}', 'd')`)
    await order('START')
    await notes.reaches('SUBSCRIBED')
    await write(`insert into notes (id, owner, title) values (5, '${ALICE}', 'e')`)
    const came = new Map([[identity(first), first]])
    await notes.changes.until((change) => came.set(identity(change), change) && change.new.id === 5)
    // What it may have got twice is one change by its time and key.
    assert.deepEqual([...came.values()].map(brief), [1, 2, 4, 5].map((id) => `INSERT ${id}`))
  },

  async has_channels_that_come_and_go_on_their_own() {
    const client = await connect(RELAY, await token('anon'), await token('alice'))
    const all = await subscribed(client, 'all', BOARD)
    const seven = await subscribed(client, 'seven', { ...BOARD, filter: 'list=eq.7' })
    const notes = await subscribed(client, 'notes', NOTES)
    await write(`insert into board values (1, 7, 'a'), (2, 8, 'b')`)
    await write(`insert into notes (id, owner, title) values (3, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(all, 2), ['INSERT 1', 'INSERT 2'])
    assert.deepEqual([await briefs(seven, 1), await briefs(notes, 1)], [['INSERT 1'], ['INSERT 3']])

    assert.equal(await client.removeChannel(all.channel), 'ok')
    assert.equal((await all.statuses.next()).status, 'CLOSED')
    await write(`insert into board values (4, 7, 'a')`)
    assert.deepEqual(await briefs(seven, 1), ['INSERT 4'])

    const again = await subscribed(client, 'all', BOARD)
    await write(`insert into board values (5, 8, 'b'), (6, 7, 'a')`)
    assert.deepEqual(await briefs(again, 2), ['INSERT 5', 'INSERT 6'])
    assert.deepEqual(await briefs(seven, 1), ['INSERT 6'])
    all.changes.put('the end')
    assert.equal(await all.changes.next(), 'the end')
    for (const listening of [again, seven, notes]) {
      await client.removeChannel(listening.channel)
      assert.equal((await listening.statuses.next()).status, 'CLOSED')
    }
  },

  async is_told_why_a_subscription_fails() {
    const client = await connect(RELAY, await token('anon'))
    for (const [binding, reason] of [
      [{ ...BOARD, filter: 'nope=eq.1' }, /invalid column for filter nope/],
      [{ ...BOARD, filter: 'list=eq.many' }, /invalid input syntax for type integer: "many"/],
      [{ ...BOARD, table: 'unwatched' }, /Unable to subscribe to changes with given parameters/],
      [{ ...BOARD, filter: 'list' }, /Error parsing `filter` params/],
    ]) {
      const bad = listen(client, `bad ${reason}`, binding)
      const message = await bad.systems.next()
      assert.deepEqual([message.status, message.extension], ['error', 'postgres_changes'])
      assert.match(message.message, reason)
    }
    const board = await subscribed(client, 'board', BOARD)
    await write(`insert into board values (1, 7, 'a')`)
    assert.deepEqual(await briefs(board, 1), ['INSERT 1'])
  },

  async stays_subscribed_when_it_is_told_that_no_policy_shows_it_a_row() {
    const client = await connect(RELAY, await token('anon'), await token('alice'))
    const closed = await subscribed(client, 'closed', { event: '*', schema: 'public', table: 'closed' })
    const message = await closed.systems.next()
    assert.deepEqual([message.status, message.extension], ['ok', 'postgres_changes'])
    assert.match(message.message, /^public.closed: no row-level policy lets authenticated read a row: create policy /)
    await write('create policy everyone on closed for select to authenticated using (true); insert into closed values (1)')
    assert.deepEqual(await briefs(closed, 1), ['INSERT 1'])
    assert.equal(closed.statuses.size, 0)
  },

  async is_refused_with_an_expired_token_and_let_in_with_a_new_one() {
    const client = await connect(RELAY, await token('anon'), await token('alice', -10))
    let notes = listen(client, 'notes', NOTES)
    const { error } = await notes.reaches('CHANNEL_ERROR')
    assert.match(error, /InvalidJWTToken: Token has expired \d+ seconds ago/)
    await client.setAuth(await token('alice'))
    if (!tries) {
      await client.removeChannel(notes.channel)
      notes = listen(client, 'notes', NOTES)
    }
    await notes.reaches('SUBSCRIBED')
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(notes, 1), ['INSERT 1'])
  },

  async is_closed_when_its_token_ends() {
    const client = await connect(RELAY, await token('anon'), await token('alice', 4))
    const notes = await subscribed(client, 'notes', NOTES)
    const message = await notes.systems.next()
    assert.equal(message.status, 'error')
    assert.match(message.message, /Token has expired \d+ seconds ago/)
    await notes.reaches('CLOSED')
    await client.setAuth(await token('alice'))
    const again = await subscribed(client, 'notes', NOTES)
    await write(`insert into notes (id, owner, title) values (1, '${ALICE}', 'a')`)
    assert.deepEqual(await briefs(again, 1), ['INSERT 1'])
  },

  async sends_broadcasts_to_others_and_to_itself_and_is_told_that_they_were_sent() {
    const key = await token('anon')
    const ann = await enter(await connect(RELAY, key), 'room', { self: true, ack: true })
    const ben = await enter(await connect(RELAY, key), 'room')
    const other = await enter(await connect(RELAY, key), 'elsewhere')
    const payload = { n: 1.5, text: 'é', list: [null, { a: true }] }
    assert.equal(await ann.send('one', payload), 'ok')
    assert.deepEqual(await ann.messages.next(), sent('one', payload))
    assert.deepEqual(await ben.messages.next(), sent('one', payload))
    assert.equal(await ben.send('two', {}), 'ok')
    assert.deepEqual(await ann.messages.next(), sent('two', {}))
    assert.equal(await ann.send('three', {}), 'ok')
    // Ben has not received his own, and nobody anything of another topic.
    assert.deepEqual(await ben.messages.next(), sent('three', {}))
    assert.equal(await other.send('last', {}), 'ok')
    assert.equal(await ann.send('last', {}), 'ok')
    assert.deepEqual(await ben.messages.next(), sent('last', {}))
  },

  async hears_broadcasts_from_sql_with_their_ids() {
    const ben = await enter(await connect(RELAY, await token('anon')), 'room')
    await write(`select realtime.send('{"n": 1.5, "id": "mine"}', 'one', 'room', false)`)
    const { meta, ...message } = await ben.messages.next()
    assert.deepEqual(message, sent('one', { n: 1.5, id: 'mine' }))
    assert.match(meta.id, /^[0-9a-f-]{36}$/)
    await write(`select realtime.send('{}', 'of private channels', 'room')`)
    await write(`select realtime.send('{}', 'two', 'room', false)`)
    const two = await ben.messages.next()
    assert.deepEqual([two.event, two.payload], ['two', { id: two.meta.id }])
    await write(`select realtime.send_binary('\\x00ff', 'bytes', 'room', false)`)
    await write(`select realtime.send('{}', 'last', 'room', false)`)
    const last = await ben.messages.next()
    if (binary) assert.deepEqual([...new Uint8Array(last.payload)], [0, 255])
    assert.equal((binary ? await ben.messages.next() : last).event, 'last')
  },

  async uses_the_private_channels_that_the_policies_give_it() {
    await write(`create policy own on realtime.messages for all to authenticated
      using (realtime.topic() = 'room:' || auth.uid()::text)`)
    const topic = `room:${ALICE}`
    const alice = async () => connect(RELAY, await token('anon'), await token('alice'))
    const one = await enter(await alice(), topic, { isPrivate: true, key: 'one', self: true, ack: true })
    const two = await enter(await alice(), topic, { isPrivate: true, key: 'two' })
    assert.equal(await one.send('one', { n: 1 }), 'ok')
    for (const room of [one, two]) assert.deepEqual(await room.messages.next(), sent('one', { n: 1 }))
    assert.equal(await one.channel.track({ n: 1 }), 'ok')
    assert.equal(await two.channel.track({ n: 2 }), 'ok')
    await two.syncs.until((state) => state === 'one 1 two 2')
    await write(`select realtime.send('{"n": 2}', 'two', '${topic}')`)
    for (const room of [one, two]) assert.equal((await room.messages.next()).payload.n, 2)
    const bob = await connect(RELAY, await token('anon'), await token('bob'))
    const statuses = new Inbox('bob')
    bob.channel(topic, { config: { private: true } }).subscribe((status, error) => statuses.put(`${status} ${error?.message}`))
    assert.match(await statuses.next(), /^CHANNEL_ERROR .*You do not have permissions to read from this Channel topic/)
  },

  async sends_a_hundred_without_waiting_in_order() {
    const key = await token('anon')
    const ann = await enter(await connect(RELAY, key), 'room')
    const ben = await enter(await connect(RELAY, key), 'room')
    for (let n = 0; n < 100; n++) ann.send('n', { n })
    const messages = await ben.messages.take(100)
    assert.deepEqual(messages.map(({ payload }) => payload.n), [...Array(100).keys()])
  },

  async is_told_that_a_broadcast_is_too_large_and_goes_on() {
    const key = await token('anon')
    const ann = await enter(await connect(RELAY, key), 'room', { ack: true })
    const ben = await enter(await connect(RELAY, key), 'room')
    assert.equal(await ann.send('large', { text: 'x'.repeat(3_100_000) }), 'error')
    assert.equal(await ann.send('small', {}), 'ok')
    assert.deepEqual(await ben.messages.next(), sent('small', {}))
  },

  async sends_by_http_without_joining() {
    const key = await token('anon')
    const ben = await enter(await connect(RELAY, key), 'room')
    const client = await connect(RELAY, key)
    const channel = client.channel('room')
    assert.equal(await channel.send({ type: 'broadcast', event: 'batch', payload: { n: 1 } }), 'ok')
    assert.deepEqual(await ben.messages.next(), sent('batch', { n: 1 }))
    if (channel.httpSend) {
      assert.deepEqual(await channel.httpSend('single', { n: 2 }), { success: true })
      assert.deepEqual(await ben.messages.next(), sent('single', { n: 2 }))
      const forged = await connect(RELAY, `${key.replace(/\.[^.]*$/, '')}.${'A'.repeat(43)}`)
      await assert.rejects(forged.channel('room').httpSend('single', {}), /Failed to validate JWT signature/)
    }
  },

  async gets_bytes_where_its_version_has_them() {
    const key = await token('anon')
    const ann = await enter(await connect(RELAY, key), 'room')
    const ben = await enter(await connect(RELAY, key), 'room')
    const post = (event, type, body) => fetch(`${RELAY}/realtime/v1/api/broadcast/room/events/${event}`, {
      method: 'POST', headers: { apikey: key, 'content-type': type }, body,
    })
    assert.equal((await post('bytes', 'application/octet-stream', new Uint8Array([0, 255, 7]))).status, 202)
    if (binary) {
      const { event, payload } = await ben.messages.next()
      assert.deepEqual([event, [...new Uint8Array(payload)]], ['bytes', [0, 255, 7]])
      await ann.messages.next()
      ann.send('own', new Uint8Array([1, 2]).buffer)
      assert.deepEqual([...new Uint8Array((await ben.messages.next()).payload)], [1, 2])
    }
    assert.equal((await post('json', 'application/json', '{"n":1}')).status, 202)
    assert.deepEqual(await ben.messages.next(), sent('json', { n: 1 }))
  },

  async knows_who_is_present_from_which_tabs() {
    const key = await token('anon')
    const tabs = [await connect(RELAY, key), await connect(RELAY, key)]
    const first = await enter(tabs[0], 'room', { key: 'ann' })
    assert.equal(await first.channel.track({ n: 1 }), 'ok')
    assert.equal(await first.syncs.until((state) => state !== ''), 'ann 1')
    const second = await enter(tabs[1], 'room', { key: 'ann' })
    const ben = await enter(await connect(RELAY, key), 'room', { key: 'ben' })
    assert.equal(await second.channel.track({ n: 2 }), 'ok')
    assert.equal(await ben.channel.track({ n: 3 }), 'ok')
    for (const member of [first, second, ben]) {
      await member.syncs.until((state) => state === 'ann 1,2 ben 3')
    }
    // A change is one leave and one join, and no moment without the member.
    assert.equal(await ben.channel.track({ n: 4 }), 'ok')
    assert.equal(await first.syncs.next(), 'ann 1,2 ben 4')
    assert.equal(await first.leaves.until((leave) => leave.startsWith('ben')), 'ben 3')
    await first.joins.until((join) => join === 'ben 4')
    assert.equal(await second.channel.untrack(), 'ok')
    assert.equal(await first.syncs.next(), 'ann 1 ben 4')
    assert.equal(await second.channel.track({ n: 5 }), 'ok')
    assert.equal(await first.syncs.next(), 'ann 1,5 ben 4')
    await tabs[1].removeChannel(second.channel)
    assert.equal(await first.syncs.next(), 'ann 1 ben 4')
    const read = await fetch(`${RELAY}/realtime/v1/presence?topic=room`, { headers: { apikey: key } })
    assert.deepEqual(Object.keys(await read.json()), ['ann', 'ben'])
  },

  async is_gone_when_its_socket_was_cut_and_is_present_when_it_tracks_again() {
    const key = await token('anon')
    const ann = await enter(await connect(PROXY, key), 'room', { key: 'ann' })
    const ben = await enter(await connect(RELAY, key), 'room', { key: 'ben' })
    await ann.channel.track({ n: 1 })
    await ben.channel.track({ n: 2 })
    await ben.syncs.until((state) => state === 'ann 1 ben 2')
    await order('CUT')
    await ben.syncs.until((state) => state === 'ben 2')
    await ann.statuses.until(({ status }) => status === 'SUBSCRIBED')
    await ann.channel.track({ n: 3 })
    assert.equal(await ben.syncs.until((state) => state.includes('ann')), 'ann 3 ben 2')
    assert.equal(await ann.syncs.until((state) => state.includes('ann 3')), 'ann 3 ben 2')
  },

  async is_not_connected_with_a_wrong_signature() {
    const forged = `${(await token('alice')).replace(/\.[^.]*$/, '')}.${'A'.repeat(43)}`
    const notes = listen(await connect(RELAY, forged, forged), 'notes', NOTES)
    assert.equal((await within('a refusal', notes.statuses.next())).status, 'CHANNEL_ERROR')
  },
})
