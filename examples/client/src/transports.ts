// The ways by which changes come. Each is a function of a cursor to what comes after it, so one may follow another at any time.
import { parseExactly } from './json.js'

/** A change as the relay tells it. */
export interface Change {
  type: 'INSERT' | 'UPDATE' | 'DELETE'
  schema: string
  table: string
  record?: Record<string, unknown>
  old_record?: Record<string, unknown>
  /** The row is there, and is not visible any more. */
  leave?: boolean
  txid: string
  number: string
  last?: boolean
  commit_timestamp: string
  errors?: string[] | null
  cursor?: string
}

/** What comes: changes and the cursor after them, or what is said of the connection. */
export interface Heard {
  changes?: Change[]
  cursor?: string
  /** The changes up to here are whole transactions. */
  whole?: boolean
  /** The connection is open (`true`), or the relay waits for its database (the reason). */
  open?: true | string
}

/** What is asked for, and how. */
export interface Ask {
  url: string
  token: string
  /** The parameters that name the tables. */
  query: URLSearchParams
  /** The same as the entries of a channel. */
  entries: object[]
  signal: AbortSignal
}

export type Transport = (ask: Ask, cursor: string) => AsyncGenerator<Heard>

/** Changes are missing: the rows have to be read again. */
export class Gap extends Error {}
/** The relay does not give this to this token; asking the same again is answered alike. */
export class Refused extends Error {}

/** A connection of which nothing was heard for so long is given up, in milliseconds. */
const OPENING = 8_000
const SILENCE = 40_000
const HEARTBEAT = 20_000
const POLL_SECONDS = 25

/** Aborts when nothing is heard for a time: not in a tab that sleeps, whose timers stand still, but right after. */
class Watchdog {
  #heard = Date.now()
  #limit: number
  #timer: ReturnType<typeof setInterval>
  readonly controller = new AbortController()

  constructor(outer: AbortSignal, limit: number) {
    this.#limit = limit
    const end = () => this.controller.abort(outer.reason)
    if (outer.aborted) end()
    else outer.addEventListener('abort', end, { once: true, signal: this.controller.signal })
    this.#timer = setInterval(() => {
      if (globalThis.document?.hidden !== true && Date.now() - this.#heard > this.#limit) this.controller.abort(new Error('nothing was heard for too long'))
    }, 1000)
  }

  heard(limit = this.#limit) {
    this.#limit = limit
    this.#heard = Date.now()
  }

  end() {
    clearInterval(this.#timer)
    this.controller.abort()
  }
}

/** Asks over HTTP; throws what the relay refuses. */
async function request({ url, token, query }: Ask, more: Record<string, string>, headers: Record<string, string>, signal: AbortSignal) {
  const all = new URLSearchParams(query)
  for (const [name, value] of Object.entries(more)) all.set(name, value)
  const answer = await fetch(`${url}/realtime/v1/changes?${all}`, {
    headers: { Authorization: `Bearer ${token}`, ...headers },
    cache: 'no-store',
    signal,
  }).catch((error) => {
    throw signal.aborted ? signal.reason : new Error(`${url} cannot be reached (${error.message})`)
  })
  if (answer.ok) return answer
  const text = await answer.text()
  let why = text
  try {
    why = JSON.parse(text).error ?? text
  } catch {}
  if (answer.status === 410) throw new Gap(why)
  if (answer.status < 500 && answer.status !== 429 && answer.status !== 408) throw new Refused(why)
  throw new Error(`${answer.status} ${why}`)
}

async function json(ask: Ask, more: Record<string, string>, patience: number) {
  const watchdog = new Watchdog(ask.signal, patience)
  try {
    return parseExactly(await (await request(ask, more, {}, watchdog.controller.signal)).text())
  } finally {
    watchdog.end()
  }
}

export interface Rows {
  cursor: string
  tables: Record<string, Record<string, unknown>[]>
  keys: Record<string, string[]>
  notice?: string
}

/** The rows of now, and the cursor after them. They are waited for longer after each failure: some connections hang, some reads are long. */
export const rows = (ask: Ask, failures: number): Promise<Rows> => json(ask, {}, OPENING * 2 ** Math.min(failures, 4))

/** Long polls: each answer ends with a cursor. */
export async function* poll(ask: Ask, cursor: string): AsyncGenerator<Heard> {
  // The first is answered at once, so that it is known that they pass.
  for (let wait = 0; ; wait = POLL_SECONDS) {
    const answer = await json(ask, { since: cursor, wait: String(wait) }, wait * 1000 + OPENING)
    cursor = answer.cursor
    yield { changes: answer.changes, cursor, whole: !answer.more || answer.changes.at(-1)?.last === true, open: true }
  }
}

/** An event stream, read by fetch: unlike an EventSource it has headers, and says with what status it was refused. */
export async function* stream(ask: Ask, cursor: string): AsyncGenerator<Heard> {
  const watchdog = new Watchdog(ask.signal, OPENING)
  const { signal } = watchdog.controller
  try {
    const answer = await request(ask, {}, { Accept: 'text/event-stream', 'Last-Event-ID': cursor }, signal)
    const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader()
    let text = ''
    for (;;) {
      const { value, done } = await reader.read()
      if (done) return
      // Proxies that hold a stream back hold back its first event, too.
      watchdog.heard(SILENCE)
      const blocks = (text + value).split('\n\n')
      text = blocks.pop()!
      for (const block of blocks) {
        const heard = event(block)
        if (heard) yield heard
      }
    }
  } finally {
    watchdog.end()
  }
}

function event(block: string): Heard | undefined {
  const fields: Record<string, string> = {}
  for (const line of block.split('\n')) {
    const [, name, value] = /^(\w+): ?(.*)$/.exec(line) ?? []
    if (name) fields[name] = name in fields ? `${fields[name]}\n${value}` : value!
  }
  const { event, id, data } = fields
  switch (event) {
    case 'change': {
      const change: Change = parseExactly(data!)
      return { changes: [change], cursor: id!, whole: change.last === true }
    }
    case 'gap':
      throw new Gap(JSON.parse(data!).error)
    case 'failure':
      throw new Refused(JSON.parse(data!).error)
    case 'stalled':
      return { open: JSON.parse(data!).error }
    case 'resumed':
      return { open: true }
  }
  // A position without an event: everything up to it was told.
  return id ? { changes: [], cursor: id, whole: true, open: true } : undefined
}

const TOPIC = 'realtime:live'

/** A socket, with the protocol that Supabase clients speak. Its channel is joined with the cursor. */
export async function* socket(ask: Ask, cursor: string): AsyncGenerator<Heard> {
  const address = `${ask.url.replace(/^http/, 'ws')}/realtime/v1/websocket?vsn=2.0.0&cursor=true&apikey=${encodeURIComponent(ask.token)}`
  const watchdog = new Watchdog(ask.signal, OPENING)
  const came: string[] = []
  let wake = () => {}
  let isOver = false
  const ws = new WebSocket(address)
  const send = (topic: string, event: string, payload: object) => ws.send(JSON.stringify(['1', '1', topic, event, payload]))
  const over = () => {
    isOver = true
    wake()
  }
  ws.onopen = () => send(TOPIC, 'phx_join', { config: { postgres_changes: ask.entries, since: cursor } })
  ws.onmessage = ({ data }) => {
    came.push(data)
    wake()
  }
  ws.onclose = ws.onerror = over
  watchdog.controller.signal.addEventListener('abort', over)
  const beat = setInterval(() => ws.readyState === 1 && send('phoenix', 'heartbeat', {}), HEARTBEAT)
  try {
    for (;;) {
      while (came.length) {
        watchdog.heard()
        const heard = frame(came.shift()!)
        // Only an answer to the join says that it is open; the socket itself may be a proxy's.
        if (heard?.open) watchdog.heard(SILENCE)
        if (heard) yield heard
      }
      if (isOver) throw watchdog.controller.signal.reason ?? new Error('the socket was closed')
      await new Promise<void>((resolve) => (wake = resolve))
    }
  } finally {
    clearInterval(beat)
    watchdog.end()
    ws.onmessage = null
    ws.close()
  }
}

function frame(text: string): Heard | undefined {
  const [, , topic, name, payload] = parseExactly(text)
  if (topic !== TOPIC) return undefined
  switch (name) {
    case 'postgres_changes': {
      const change: Change = payload.data
      return { changes: [change], cursor: change.cursor!, whole: change.last === true }
    }
    case 'phx_reply':
      if (payload.status === 'error') throw new Refused(payload.response.reason)
      return undefined
    case 'system': {
      const { status, message } = payload
      if (message.startsWith('Gap:')) throw new Gap(message)
      if (message.startsWith('Stalled:')) return { open: message }
      if (status !== 'ok') throw new Refused(message)
      return { open: true }
    }
    case 'phx_close':
    case 'phx_error':
      throw new Error('the relay closed the channel')
  }
  return undefined
}

export const transports = { socket, stream, poll }
export type TransportName = keyof typeof transports
