// Requests to the relay. The token is sent in a header, and kept in this tab only.

const KEY = 'relay-inspector-token'
/** After an event stream has ended by itself. */
const PAUSE_MS = 1000

let token = sessionStorage.getItem(KEY)

export const hasToken = () => token !== null

export function signOut() {
  token = null
  sessionStorage.removeItem(KEY)
}

/** Keeps a token that the relay accepts; throws why it does not. */
export async function signIn(given) {
  const before = token
  token = given.trim()
  try {
    const overview = await ask('overview')
    sessionStorage.setItem(KEY, token)
    return overview
  } catch (error) {
    token = before
    throw error
  }
}

/** What a request is refused with; `status` 0 when there was no answer. */
export class Refused extends Error {
  constructor(status, message) {
    super(message)
    this.status = status
  }
}

const address = (path, parameters = {}) => {
  const url = new URL(path, import.meta.url)
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== '' && value !== null && value !== undefined) url.searchParams.set(name, value)
  }
  return url
}

async function request(url, headers, signal) {
  let answer
  try {
    answer = await fetch(url, { headers, signal, cache: 'no-store', credentials: 'omit' })
  } catch (error) {
    if (signal?.aborted) throw error
    throw new Refused(0, 'The relay does not answer.')
  }
  if (answer.ok) return answer
  const body = await answer.json().catch(() => ({}))
  throw new Refused(answer.status, body.error ?? `The relay answered ${answer.status}.`)
}

/** Asks the relay for JSON. */
export async function ask(path, parameters, headers = {}) {
  const answer = await request(address(path, parameters), { authorization: `Bearer ${token}`, ...headers })
  return answer.json()
}

/** Asks the relay for text. */
export async function askText(path) {
  return (await request(address(path), { authorization: `Bearer ${token}` })).text()
}

/**
 * Follows an event stream until the returned function is called, and continues after its last event when it breaks.
 * `handle.event(name, data, id)` gets each event, `handle.state(text, tone)` what became of the connection.
 */
export function follow(path, parameters, handle, as = token) {
  const end = new AbortController()
  let last = null
  const run = async () => {
    while (!end.signal.aborted) {
      try {
        const headers = { authorization: `Bearer ${as}`, accept: 'text/event-stream' }
        if (last) headers['last-event-id'] = last
        const answer = await request(address(path, parameters), headers, end.signal)
        handle.state('live', 'good')
        await read(answer.body, (name, data, id) => {
          if (id) last = id
          if (name) handle.event(name, data, id)
        })
        if (!end.signal.aborted) handle.state('connecting again', 'warn')
      } catch (error) {
        if (end.signal.aborted) return
        const isFinal = error instanceof Refused && error.status >= 400 && error.status < 500
        if (error.status === 410) {
          // A cursor that is too old: the changes until now are lost to this page, which says so and begins anew.
          last = null
          handle.event('gap', { error: error.message })
        } else if (isFinal) return handle.state(error.message, 'bad')
        handle.state(error.message ?? 'the connection broke', 'warn')
      }
      await new Promise((passed) => setTimeout(passed, PAUSE_MS))
    }
  }
  run()
  return () => end.abort()
}

/** Reads the events of a stream: name, data, id. */
async function read(body, handle) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (;;) {
    const { value, done } = await reader.read()
    if (done) return
    rest += value
    const blocks = rest.split('\n\n')
    rest = blocks.pop()
    for (const block of blocks) {
      const fields = { event: '', data: [], id: '' }
      for (const line of block.split('\n')) {
        const [, name, text] = /^(\w+): ?(.*)$/.exec(line) ?? []
        if (name === 'data') fields.data.push(text)
        else if (name) fields[name] = text
      }
      handle(fields.event, fields.data.length ? JSON.parse(fields.data.join('\n')) : null, fields.id)
    }
  }
}

/** Calls `work` now and every `ms`, one at a time, while the page is visible; stops by the returned function. */
export function repeat(ms, work) {
  let timer = null
  let isOver = false
  const turn = async () => {
    if (!document.hidden) await work()
    if (!isOver) timer = setTimeout(turn, ms)
  }
  turn()
  return () => {
    isOver = true
    clearTimeout(timer)
  }
}

let relations = null

/** The watched relations; read once for all panes, again with `anew`. */
export async function watched(anew = false) {
  if (anew || !relations) {
    relations = ask('relations').then((answer) => answer.relations)
    relations.catch(() => { relations = null })
  }
  return relations
}
