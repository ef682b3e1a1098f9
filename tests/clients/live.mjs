// The helper of examples/client under faults: what it holds equals the tables in the end, whatever happened in between.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { WebSocket as Ws } from 'ws'
import { compile } from './compiled.mjs'
import { order, PROXY, read, run, token, within, write } from './harness.mjs'

const folder = compile()
const { live } = await import(join(folder, 'live.js'))
const { parseExactly } = await import(join(folder, 'json.js'))

/** Random numbers that come again with the same seed. */
function dice(seed) {
  let state = BigInt(seed) || 1n
  return (bound) => {
    state ^= (state << 13n) & 0xffffffffffffffffn
    state ^= state >> 7n
    state ^= (state << 17n) & 0xffffffffffffffffn
    return Number(state % BigInt(bound))
  }
}

const ALICE = 'aaaaaaaa-0000-4000-8000-000000000001'
const BOB = 'bbbbbbbb-0000-4000-8000-000000000002'

const TABLES = `
  create table tasks (id bigint primary key, owner uuid, title text, weight numeric, size double precision);
  alter table tasks enable row level security;
  create policy own on tasks using (owner is null or owner = auth.uid());
  create schema crm; grant usage on schema crm to authenticated;
  create table crm.parts (task bigint, place text, n bigint not null default 0, primary key (task, place));
  grant select on tasks, crm.parts to authenticated;
  select relay.watch('tasks', leave_events => true), relay.watch('crm.parts');
  insert into tasks select g, null, 'task ' || g, g / 7.0, g / 7.0 from generate_series(1, 20) g;
  insert into crm.parts select g, 'a', 9007199254740993 + g from generate_series(1, 10) g;`

/** The rows of a table as PostgreSQL gives them to Alice. */
async function truth(table, key) {
  const rows = await read(`begin; set local role authenticated; set local request.jwt.claims = '{"sub": "${ALICE}", "role": "authenticated"}';
    select coalesce(jsonb_agg(to_jsonb(t) order by ${key}), '[]')::text from ${table} t; commit`)
  return parseExactly(rows)
}

const text = (value) => JSON.stringify(value, (_, part) => (typeof part === 'bigint' ? `${part}n` : part))
// As objects have their members in the order in which they were written.
const sorted = (rows, ...keys) =>
  [...rows]
    .map((row) => Object.fromEntries(Object.entries(row).sort(([one], [other]) => (one < other ? -1 : 1))))
    .sort((one, other) => (keys.map((key) => (one[key] < other[key] ? -1 : one[key] > other[key] ? 1 : 0)).find(Boolean) ?? 0))

/** Waits until the collections are the tables. */
async function equals(client, what) {
  const tasks = text(sorted(await truth('tasks', 'id'), 'id'))
  const parts = text(sorted(await truth('crm.parts', 'task, place'), 'task', 'place'))
  const has = () => [text(sorted(client.rows('tasks'), 'id')), text(sorted(client.rows('crm.parts'), 'task', 'place'))]
  let stop
  try {
    await within(`${what}: the collections equal the tables`, new Promise((resolve) => {
      const look = () => {
        const [first, second] = has()
        if (first === tasks && second === parts) resolve()
      }
      stop = client.subscribe(look)
      look()
    }))
  } catch (error) {
    const [first, second] = has()
    throw new Error(`${error.message}, ${text(client.status)}\n${first}\n${tasks}\n${second}\n${parts}`)
  } finally {
    stop()
  }
}

function equal(found, expected) {
  if (found !== expected) throw new Error(`${text(found)} instead of ${text(expected)}`)
}

const note = (line) => console.error(`${(performance.now() / 1000).toFixed(2)} ${line}`)

/** Waits until the status is this. */
function becomes(client, state, transport) {
  let stop
  const is = () => client.status.state === state && (!transport || client.status.transport === transport)
  return within(`${state} ${transport ?? ''}`, new Promise((resolve) => {
    stop = client.subscribe(() => is() && resolve())
    if (is()) resolve()
  })).finally(() => stop())
}

/** One statement of a random writer. */
function statement(roll) {
  const id = 1 + roll(30)
  const some = `id % ${2 + roll(5)} = 0`
  const writes = [
    () => `insert into tasks values (${id}, ${['null', `'${ALICE}'`, `'${BOB}'`][roll(3)]}, 'new ${roll(100)}', random() * 1e20, random()) on conflict do nothing`,
    () => `update tasks set title = title || '.', weight = weight * 1.000000000000000001 where ${some}`,
    () => `update tasks set owner = '${[ALICE, BOB][roll(2)]}' where id = ${id}`,
    () => `update tasks set owner = null where ${some}`,
    () => `delete from tasks where id = ${id}`,
    () => `update tasks set id = ${31 + roll(30)} where id = ${id} and not exists (select from tasks where id > 30)`,
    () => `update tasks set id = ${id} where id > 30 and not exists (select from tasks where id = ${id})`,
    () => `insert into crm.parts values (${id}, '${'ab'[roll(2)]}', 9007199254740993) on conflict (task, place) do update set n = parts.n + 1`,
    () => `delete from crm.parts where task = ${id}`,
    () => `begin; update tasks set size = size + 0.1 where ${some}; insert into crm.parts values (${id}, 'c') on conflict do nothing; update crm.parts set n = n + 1; commit`,
    () => `begin; delete from tasks; rollback`,
    () => `insert into crm.parts select g, 'many', g from generate_series(1, 400) g on conflict (task, place) do update set n = parts.n + 1`,
    () => `delete from crm.parts where place = 'many'`,
  ]
  return writes[roll(writes.length)]()
}

/** What fails, with the words that say so. `net` is what the browser lets through. */
const faults = (net) => ({
  'socket cut': () => order('CUT'),
  'relay restarted': async () => {
    await order('STOP')
    await write(`update tasks set title = 'while it was down' where id % 4 = 1; delete from tasks where id % 4 = 2`)
    await order('START')
  },
  'connections of PostgreSQL cut': () =>
    write(`select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()`),
  'column added': (roll) => write(`alter table tasks add column if not exists added${roll(3)} text default 'x'`),
  'column dropped': (roll) => write(`alter table tasks drop column if exists added${roll(3)}`),
  'table rewritten': (roll) => write(`alter table crm.parts alter n type ${['numeric', 'bigint'][roll(2)]}`),
  'table emptied': () => write('truncate crm.parts'),
  // All timers and sockets stand still.
  'tab asleep': () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 400),
  'cut in a sleep': async () => {
    await order('CUT')
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300)
  },
  'sockets blocked': () => {
    net.sockets = false
    return order('CUT')
  },
  'streams blocked': () => {
    net.streams = false
    return order('CUT')
  },
  unblocked: () => Object.assign(net, { sockets: true, streams: true }),
})

/** Lets through what it says: a blocked socket is refused, a blocked stream is held back as by a proxy that waits for its end. */
function network() {
  const net = { sockets: true, streams: true }
  globalThis.WebSocket = class extends Ws {
    constructor(address) {
      super(net.sockets ? address : 'ws://127.0.0.1:9/')
    }
  }
  const fetched = globalThis.fetch
  globalThis.fetch = (address, init) => {
    const isHeld = !net.streams && init.headers.Accept === 'text/event-stream'
    return isHeld ? Promise.reject(new TypeError('blocked')) : fetched(address, init)
  }
  return net
}

async function play(seed, seconds) {
  const roll = dice(seed)
  const net = network()
  // Each token ends soon, so that it is renewed again and again.
  const client = live({ tasks: {}, 'crm.parts': {} }, {
    url: PROXY,
    token: () => token('alice', 2 + roll(6)),
    debug: note,
    retryFirstAfter: 1500,
  })
  try {
    // Gaps have the rows read again, which would heal what another fault lost: half of the seeds have none.
    const all = Object.entries(faults(net)).filter(([what]) => seed % 2 || !/column|table/.test(what))
    const end = performance.now() + seconds * 1000
    while (performance.now() < end) {
      for (let writes = roll(8); writes > 0; writes--) await write(statement(roll))
      const [what, happen] = all[roll(all.length)]
      note(`-- ${what}`)
      await happen(roll)
      // It comes back from some of them, and is in the middle of it at others.
      if (roll(2)) await becomes(client, 'live')
    }
    Object.assign(net, { sockets: true, streams: true })
    // The columns of rows that did not change are known with the next change.
    await write(`insert into tasks values (1000, null, 'last'); insert into crm.parts values (1000, 'last', 1)`)
    await equals(client, `seed ${seed}`)
  } catch (error) {
    throw new Error(`seed ${seed}: ${error.stack}`)
  } finally {
    client.close()
  }
}

await run({
  async equals_its_tables_in_the_end_whatever_failed() {
    await write(TABLES)
    const seeds = (process.env.RELAY_TEST_SEEDS ?? `${Date.now() % 1e6},${(Date.now() % 1e6) + 1},3`).split(',')
    for (const seed of seeds) {
      console.log(`seed ${seed}`)
      await write('delete from tasks where id >= 1000; delete from crm.parts where task >= 1000')
      await play(Number(seed), Number(process.env.RELAY_TEST_SECONDS ?? 8))
    }
  },

  async takes_the_next_way_when_one_is_blocked_and_loses_nothing_between_them() {
    await write(TABLES)
    const net = network()
    const client = live(['tasks', 'crm.parts'], { url: PROXY, debug: note, token: await token('alice'), retryFirstAfter: 1000 })
    for (const [sockets, streams, transport] of [[true, true, 'socket'], [false, true, 'stream'], [false, false, 'poll'], [true, true, 'socket']]) {
      Object.assign(net, { sockets, streams })
      await write(`update tasks set title = 'before ${transport}'`)
      await order('CUT')
      await becomes(client, 'live', transport)
      await write(`update tasks set title = 'by ${transport}'`)
      await equals(client, transport)
    }
    client.close()
  },

  async applies_each_transaction_as_a_whole() {
    await write(TABLES)
    network()
    for (const transport of ['socket', 'stream', 'poll']) {
      const client = live(['tasks', 'crm.parts'], { url: PROXY, debug: note, token: await token('alice'), transports: [transport] })
      await becomes(client, 'live')
      await write(`update tasks set title = '0'; delete from crm.parts; insert into crm.parts select id, 'x', 0 from tasks`)
      await equals(client, transport)
      const halves = []
      const stop = client.subscribe(() => {
        const titles = new Set(client.rows('tasks').map(({ title }) => title))
        const numbers = new Set(client.rows('crm.parts').map(({ n }) => String(n)))
        if (titles.size !== 1 || numbers.size !== 1 || [...titles][0] !== [...numbers][0]) halves.push([...titles, ...numbers])
      })
      for (let n = 1; n <= 30; n++) {
        await write(`begin; update tasks set title = '${n}'; update crm.parts set n = ${n}; commit`)
        if (n % 10 === 0) await order('CUT')
      }
      await equals(client, transport)
      stop()
      client.close()
      if (halves.length) throw new Error(`${transport} showed half a transaction: ${text(halves)}`)
    }
  },

  async keeps_every_digit_and_finds_rows_by_their_key() {
    await write(TABLES)
    network()
    await write(`insert into tasks values (9223372036854775807, null, '"12345678901234567890', 12345678901234567890.123456789, 0.1)`)
    const client = live(['tasks', 'crm.parts'], { url: PROXY, debug: note, token: await token('alice') })
    await becomes(client, 'live')
    await write(`insert into tasks values (-9223372036854775808, null, '\\"1', 0.30000000000000004, 1e-7)`)
    await equals(client, 'numbers')
    const row = client.get('tasks', 9223372036854775807n)
    if (row.id !== 9223372036854775807n || row.weight !== '12345678901234567890.123456789' || row.size !== 0.1) throw new Error(text(row))
    if (client.get('tasks', -9223372036854775808n).weight !== 0.30000000000000004) throw new Error(text(client.rows('tasks')))
    if (client.get('crm.parts', 1, 'a').n !== 9007199254740994n) throw new Error(text(client.rows('crm.parts')))
    client.close()
  },

  async knows_its_own_write_and_reads_again_when_asked() {
    await write(TABLES)
    network()
    const client = live({ tasks: { filter: 'id=lt.5', select: ['title'] } }, { url: PROXY, debug: note, token: await token('alice') })
    await becomes(client, 'live')
    const txid = await read(`begin; update tasks set title = 'mine' where id = 2; select pg_current_xact_id()::text; commit`)
    await client.awaitTxId(txid)
    if (text(client.get('tasks', 2)) !== '{"id":2,"title":"mine"}') throw new Error(text(client.get('tasks', 2)))
    await client.awaitTxId(txid)
    await client.refresh()
    if (client.rows('tasks').length !== 4) throw new Error(text(client.rows('tasks')))
    // It changed nothing that is seen here.
    await client.awaitTxId(await read(`begin; update tasks set title = 'other' where id = 9; select pg_current_xact_id()::text; commit`), 50)
    client.close()
  },

  async never_shows_the_rows_of_another_user() {
    await write(TABLES)
    network()
    await write(`insert into tasks values (100, '${ALICE}', 'of alice'), (101, '${BOB}', 'of bob')`)
    let who = 'alice'
    const client = live(['tasks', 'crm.parts'], { url: PROXY, debug: note, token: () => token(who) })
    await becomes(client, 'live')
    const mixed = []
    client.subscribe(() => {
      const owners = new Set(client.rows('tasks').map(({ owner }) => owner).filter(Boolean))
      if (owners.size > 1) mixed.push([...owners])
    })
    who = 'bob'
    await order('CUT')
    await within('the rows of bob', new Promise((resolve) => client.subscribe(() => client.get('tasks', 101) && resolve())))
    if (client.get('tasks', 100) || mixed.length) throw new Error(text([client.rows('tasks'), mixed]))
    client.close()
  },

  async says_why_there_are_no_rows_and_goes_on_once_there_is_a_reason_to() {
    await write(TABLES)
    network()
    await write('create table later (v int)')
    const client = live(['tasks', 'later'], { url: PROXY, debug: note, token: await token('alice') })
    await becomes(client, 'refused')
    if (!client.status.why.includes(`relay.watch('public.later')`)) throw new Error(client.status.why)
    await write(`alter table later add id int primary key; grant select on later to authenticated; select relay.watch('later'); insert into later values (1, 2)`)
    await becomes(client, 'live')
    if (client.get('later', 2).v !== 1) throw new Error(text(client.rows('later')))
    client.close()
  },

  async gives_its_rows_to_vue_and_tanstack() {
    await write(TABLES)
    network()
    const libraries = Object.entries({ vue: 'vue', query: '@tanstack/query-core', db: '@tanstack/db' })
    writeFileSync(join(folder, 'libraries.js'), libraries.map(([name, from]) => `export * as ${name} from '${from}'`).join('\n'))
    const { vue: { effectScope }, query: { QueryClient }, db: { createCollection } } = await import(join(folder, 'libraries.js'))
    const adapter = (name) => import(join(folder, `${name}.js`))
    const data = live(['tasks', 'crm.parts'], { url: PROXY, debug: note, token: await token('alice') })

    const { follow, liveQuery } = await adapter('tanstack-query')
    const client = new QueryClient()
    equal((await client.fetchQuery(liveQuery(data, 'tasks'))).length, 20)
    client.setQueryData(['summary'], 1)
    const unfollow = follow(client, data, ['tasks'], [['summary']])

    const vue = await adapter('vue')
    const scope = effectScope()
    const [rows, status] = scope.run(() => [vue.useRows(data, 'tasks'), vue.useStatus(data)])

    const { liveCollection } = await adapter('tanstack-db')
    const collection = createCollection(liveCollection(data, 'tasks', {
      onInsert: async ([{ modified }]) =>
        ({ txid: await read(`begin; insert into tasks values (${modified.id}, null, 'stored'); select pg_current_xact_id()::text; commit`) }),
    }))
    await collection.preload()
    equal(collection.size, 20)
    const inserted = collection.insert({ id: 21, owner: null, title: 'optimistic', weight: null, size: null })
    equal(collection.get('[21]').title, 'optimistic')
    await inserted.isPersisted.promise
    equal(collection.get('[21]').title, 'stored')
    await data.awaitTxId(await read(`begin; delete from tasks where id < 11; update tasks set title = 'x' where id = 11; select pg_current_xact_id()::text; commit`))

    equal(collection.size, 11)
    equal(collection.get('[11]').title, 'x')
    equal(rows.value.length, 11)
    equal(status.value.state, 'live')
    equal(client.getQueryData(['live', 'tasks']).length, 11)
    equal(client.getQueryState(['summary']).isInvalidated, true)
    scope.stop()
    unfollow()
    await write('delete from tasks')
    await equals(data, 'the end')
    equal(rows.value.length, 11)
    data.close()
  },
})
