// live(tables, options): collections of rows that stay equal to their tables. One cursor is the only truth: rows are read together
// with it, changes follow it, and whatever happens to a connection, the next one continues from it.
import { Copy } from './copy.js'
import { Gap, Refused, rows, transports, type Ask, type Change, type Heard, type TransportName } from './transports.js'

export type { Change, TransportName } from './transports.js'
export type Row = Record<string, unknown>

export interface TableOptions {
  /** The columns that identify a row; by default those of the primary key. */
  key?: string[]
  /** Only rows that match, such as `done=is.false,list=eq.7`. */
  filter?: string
  /** Only these columns, with those of the key. */
  select?: string[]
  /** The first rows of an order, such as `id.desc`, are enough to begin with. */
  order?: string
  limit?: number
  /** A change of this table changes which rows of the others are seen, so they are read again. */
  decides?: boolean
}

export type Tables = string[] | Record<string, TableOptions>

export interface Options {
  /** The address of the relay. */
  url: string
  /** A token, or what gives one that is in force. It is asked for each connection. */
  token: string | (() => string | Promise<string>)
  /** Keeps a copy in IndexedDB under this name, for a start without a network. */
  store?: string
  /** Receives a line for what happens; `true` is the console. */
  debug?: boolean | ((line: string) => void)
  /** The ways to try, in this order. */
  transports?: TransportName[]
  /** After so many milliseconds on another way than the first, the first is tried again. */
  retryFirstAfter?: number
}

export interface Status {
  /**
   * `loading`: there are no rows yet. `live`: they follow the tables. `stalled`: the relay waits for its database. `offline`: they
   * are of before, and a connection is being made. `refused`: the relay does not give them; `why` says what to do. `closed`: by `close()`.
   */
  state: 'loading' | 'live' | 'stalled' | 'offline' | 'refused' | 'closed'
  transport?: TransportName
  why?: string
}

/** What happened to the collections: a whole transaction, or everything was read again (no `txid`). */
export interface Update {
  txid?: string
  changes: Change[]
}

type Listener = (update: Update | undefined) => void

interface Collection {
  schema: string
  table: string
  options: TableOptions
  key: string[]
  rows: Map<string, Row>
  /** The rows as a list, made when it is asked for. */
  list?: Row[] | undefined
  /** The names of the columns, to know when the table was altered. */
  columns?: string | undefined
}

/** Transactions over 250 changes may have no last mark: they are whole when nothing more of them comes. In milliseconds. */
const QUIET = 2_000
const LONGEST_PAUSE = 10_000
/** Transactions that `awaitTxId` finds after they came. */
const REMEMBERED = 1_000

const sorted = (_: string, value: unknown) => (typeof value === 'bigint' ? String(value) : value)

/** What of a token decides about rows: all but its times. */
function claims(token: string): string {
  try {
    const part = token.split('.')[1]!.replaceAll('-', '+').replaceAll('_', '/')
    const { exp, iat, nbf, jti, ...rest } = JSON.parse(atob(part))
    return JSON.stringify(rest)
  } catch {
    return token
  }
}

const columns = (row: Row | undefined) => row && Object.keys(row).sort().join()

function named(name: string, options: TableOptions): Collection {
  const parts = name.match(/"(?:[^"]|"")+"|[^.]+/g) ?? []
  const [table = name, schema = 'public'] = parts.map((part) => part.replace(/^"|"$/g, '').replaceAll('""', '"')).reverse()
  return { schema, table, options, key: options.key ?? [], rows: new Map() }
}

export class Live {
  #options: Options
  #collections = new Map<string, Collection>()
  #listeners = new Set<Listener>()
  #status: Status = { state: 'loading' }
  #cursor: string | undefined
  #claims: string | undefined
  #pending: Change[] = []
  #pendingCursor: string | undefined
  #quiet: ReturnType<typeof setTimeout> | undefined
  #connection = new AbortController()
  #wake = () => {}
  #copy: Copy | undefined
  #txids = new Set<string>()
  /** The numbers of the last read that has begun, and of the last that has ended. */
  #begun = 0
  #reads = 0
  #hasRows = false
  /** The rows are to be read again. */
  #isAsked = false
  #isClosed = false

  constructor(tables: Tables, options: Options) {
    this.#options = options
    const entries = Array.isArray(tables) ? tables.map((name) => [name, {}] as const) : Object.entries(tables)
    for (const [name, table] of entries) this.#collections.set(name, named(name, table))
    if (options.store && typeof indexedDB !== 'undefined') this.#copy = new Copy(options.store)
    globalThis.addEventListener?.('online', this.#look)
    globalThis.addEventListener?.('pageshow', this.#look)
    globalThis.document?.addEventListener('visibilitychange', this.#look)
    void this.#run()
  }

  get status(): Status {
    return this.#status
  }

  /** The rows of a table, in the order in which they came. The same list as before, unless something has changed. */
  rows<T extends Row = Row>(name: string): readonly T[] {
    const collection = this.#collection(name)
    return (collection.list ??= [...collection.rows.values()]) as T[]
  }

  /** The row with this key: a value, or several in the order of the key. */
  get<T extends Row = Row>(name: string, ...key: unknown[]): T | undefined {
    return this.#collection(name).rows.get(JSON.stringify(key, sorted)) as T | undefined
  }

  /** The key of a row as one text, for adapters. */
  keyOf(name: string, row: Row): string {
    return JSON.stringify(this.#collection(name).key.map((column) => row[column]), sorted)
  }

  /** Calls `listener` after each whole transaction, when everything was read again, and, without an argument, with a new status. */
  subscribe(listener: Listener): () => void {
    this.#listeners.add(listener)
    return () => void this.#listeners.delete(listener)
  }

  /** Reads the rows again. Resolves when they are there. */
  async refresh(): Promise<void> {
    const before = this.#begun
    this.#isAsked = true
    this.#reconnect('the rows are read again')
    await this.#until(() => this.#reads > before)
  }

  /**
   * Resolves when this transaction (`pg_current_xact_id()`) is in the collections. One that does not come in time may have been read
   * with the rows, or have changed none of them: then they are read again.
   */
  async awaitTxId(txid: string | number | bigint, milliseconds = 3_000): Promise<void> {
    const before = this.#begun
    const isThere = () => this.#txids.has(String(txid)) || this.#reads > before
    await this.#until(isThere, AbortSignal.timeout(milliseconds)).catch(() => this.refresh())
  }

  close(): void {
    this.#isClosed = true
    globalThis.removeEventListener?.('online', this.#look)
    globalThis.removeEventListener?.('pageshow', this.#look)
    globalThis.document?.removeEventListener('visibilitychange', this.#look)
    this.#reconnect('closed')
    this.#set({ state: 'closed' })
    this.#copy?.close()
  }

  #collection(name: string): Collection {
    const found = this.#collections.get(name)
    if (!found) throw new Error(`${name} is not one of the tables of this live(): ${[...this.#collections.keys()].join(', ')}`)
    return found
  }

  // Timers stand still while a tab sleeps, and networks change meanwhile: look at once.
  #look = () => {
    if (globalThis.document?.visibilityState !== 'hidden') this.#wake()
  }

  #reconnect(why: string) {
    this.#drop()
    this.#connection.abort(new Error(why))
    this.#wake()
  }

  #debug(line: string) {
    const { debug } = this.#options
    if (debug) (debug === true ? console.debug : debug)(`[LIVE] ${line}`)
  }

  #set(status: Status) {
    const { state, transport, why } = this.#status
    if ((this.#isClosed && status.state !== 'closed') || (state === status.state && transport === status.transport && why === status.why)) return
    this.#status = status
    this.#debug(`${status.state}${status.transport ? ` by ${status.transport}` : ''}${status.why ? `: ${status.why}` : ''}`)
    this.#tell(undefined)
  }

  #tell(update: Update | undefined) {
    for (const listener of [...this.#listeners]) {
      try {
        listener(update)
      } catch (error) {
        // It is told as an error of its own, and keeps no change from the others.
        setTimeout(() => { throw error })
      }
    }
  }

  #until(isThere: () => boolean, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const look = () => {
        if (!isThere() && !this.#isClosed && !signal?.aborted) return
        stop()
        if (isThere()) resolve()
        else reject(new Error(this.#isClosed ? 'closed' : 'it did not come in time'))
      }
      const stop = this.subscribe(look)
      signal?.addEventListener('abort', look)
      look()
    })
  }

  /** What the relay is asked: the parameters of a request, and the entries of a channel. */
  #ask(token: string): Ask {
    const query = new URLSearchParams({ tables: [...this.#collections.keys()].join(',') })
    const entries = [...this.#collections].map(([name, { schema, table, options, key }]) => {
      const { filter, select } = options
      const columns = select && [...new Set([...key, ...select])]
      if (filter) query.set(`${name}.filter`, filter)
      if (columns) query.set(`${name}.select`, columns.join(','))
      return { event: '*', schema, table, ...(filter && { filter }), ...(columns && { select: columns }) }
    })
    return { url: this.#options.url.replace(/\/$/, ''), token, query, entries, signal: this.#connection.signal }
  }

  async #run() {
    const { transports: names = ['socket', 'stream', 'poll'], token, retryFirstAfter = 300_000 } = this.#options
    let [way, failures] = [0, 0]
    while (!this.#isClosed) {
      const transport = names[way]!
      let opened: number | undefined
      let retry: ReturnType<typeof setTimeout> | undefined
      const { signal } = (this.#connection = new AbortController())
      try {
        const current = typeof token === 'string' ? token : await token()
        await this.#become(claims(current))
        if (!this.#cursor || this.#isAsked) await this.#read(current, failures)
        this.#debug(`${transport} from ${this.#cursor}`)
        const tryFirst = () => {
          way = 0
          this.#reconnect('the first way is tried again')
        }
        for await (const heard of transports[transport](this.#ask(current), this.#cursor!)) {
          signal.throwIfAborted()
          this.#take(heard)
          if (heard.changes?.length) failures = 0
          if (!heard.open) continue
          if (way && !opened) retry = setTimeout(tryFirst, retryFirstAfter)
          opened ??= Date.now()
          this.#set(heard.open === true ? { state: 'live', transport } : { state: 'stalled', transport, why: heard.open })
        }
        throw new Error('the connection ended')
      } catch (error) {
        this.#drop()
        const why = (error as Error).message
        this.#debug(`${transport} ended: ${why}`)
        if (signal.aborted) continue
        if (opened && Date.now() - opened > LONGEST_PAUSE) failures = 0
        failures++
        // What was open is tried again, what did not open is left for the next way. There is a pause after each round of all.
        if (!opened) way = (way + 1) % names.length
        if (error instanceof Gap) this.#cursor = undefined
        else if (error instanceof Refused && !opened) this.#set({ state: 'refused', why })
        else if (opened || way === 0) this.#set({ state: this.#hasRows ? 'offline' : 'loading', why })
        if (opened || way === 0) await this.#pause(failures)
      } finally {
        clearTimeout(retry)
      }
    }
  }

  async #pause(failures: number) {
    const most = Math.min(50 * 2 ** Math.min(failures, 10), LONGEST_PAUSE)
    await new Promise<void>((resolve) => {
      this.#wake = resolve
      setTimeout(resolve, most * (0.5 + Math.random() / 2))
    })
  }

  /** The rows of one user are never shown to another. */
  async #become(wanted: string) {
    if (wanted === this.#claims) return
    if (this.#hasRows) {
      this.#fill({})
      this.#hasRows = false
      this.#set({ state: 'loading' })
    }
    this.#claims = wanted
    this.#cursor = undefined
    const copied = await this.#copy?.open(JSON.stringify([this.#options.url, [...this.#collections].map(([name, { options }]) => [name, options]), wanted]))
    if (!copied) return
    for (const [name, key] of Object.entries(copied.keys)) this.#collection(name).key = key
    this.#cursor = copied.cursor
    this.#fill(copied.tables)
    this.#set({ state: 'offline', why: 'the copy of before' })
  }

  async #read(token: string, failures: number): Promise<void> {
    const ask = this.#ask(token)
    const query = new URLSearchParams(ask.query)
    for (const [name, { options }] of this.#collections) {
      if (options.order) query.set(`${name}.order`, options.order)
      if (options.limit) query.set(`${name}.limit`, String(options.limit))
    }
    const number = ++this.#begun
    const answer = await rows({ ...ask, query }, failures)
    ask.signal.throwIfAborted()
    for (const [name, collection] of this.#collections) {
      collection.key = collection.options.key ?? answer.keys[name] ?? []
      if (!collection.key.length) throw new Refused(`${name} has no primary key that may be read: name columns, such as { ${name}: { key: ['id'] } }`)
    }
    // The columns of a key belong to those that are selected.
    if (String(this.#ask(token).query) !== String(ask.query)) return this.#read(token, failures)
    this.#cursor = answer.cursor
    this.#reads = number
    this.#isAsked = false
    if (answer.notice) this.#debug(answer.notice)
    this.#debug(`rows read, ${Object.entries(answer.tables).map(([name, rows]) => `${name} ${rows.length}`).join(', ')}`)
    this.#fill(answer.tables)
    this.#save()
  }

  #fill(tables: Record<string, Row[]>) {
    this.#hasRows = true
    for (const [name, collection] of this.#collections) {
      collection.rows = new Map((tables[name] ?? []).map((row) => [this.keyOf(name, row), row]))
      collection.list = undefined
      collection.columns = columns(tables[name]?.[0])
    }
    this.#tell({ changes: [] })
  }

  #take({ changes = [], cursor, whole }: Heard) {
    if (!cursor) return
    clearTimeout(this.#quiet)
    // Another transaction ends the one before, whose last changes are hidden.
    if (this.#pending.length && changes[0] && changes[0].txid !== this.#pending.at(-1)!.txid) this.#commit(this.#pendingCursor!)
    this.#pending.push(...changes)
    this.#pendingCursor = cursor
    if (whole) this.#commit(cursor)
    else this.#quiet = setTimeout(() => this.#commit(cursor), QUIET)
  }

  #drop() {
    clearTimeout(this.#quiet)
    this.#pending = []
  }

  #commit(cursor: string) {
    const changes = this.#pending
    this.#drop()
    this.#cursor = cursor
    while (changes.length) {
      const { txid } = changes[0]!
      const end = changes.findIndex((change) => change.txid !== txid)
      this.#apply(txid, changes.splice(0, end < 0 ? changes.length : end))
    }
    this.#save()
  }

  #apply(txid: string, changes: Change[]) {
    let isIncomplete = false
    for (const change of changes) {
      for (const [name, collection] of this.#collections) {
        if (collection.schema !== change.schema || collection.table !== change.table) continue
        const { record, old_record: old } = change
        const id = change.type === 'DELETE' ? undefined : this.keyOf(name, record!)
        const before = old && collection.key.every((column) => column in old) ? this.keyOf(name, old) : undefined
        if (before !== undefined && before !== id) collection.rows.delete(before)
        if (id !== undefined) collection.rows.set(id, record!)
        collection.list = undefined
        // The other rows have other columns, too; this one was too large to be sent; it is not said which one it was.
        const isAltered = !!record && (collection.columns ??= columns(record)) !== columns(record)
        isIncomplete ||= isAltered || !!collection.options.decides || !!change.errors?.length || (id === undefined && before === undefined)
      }
    }
    this.#txids.add(txid)
    for (const oldest of this.#txids) if (this.#txids.size > REMEMBERED) this.#txids.delete(oldest)
    this.#debug(`transaction ${txid}: ${changes.map(({ type, table }) => `${type} ${table}`).slice(0, 5).join(', ')}${changes.length > 5 ? ` and ${changes.length - 5} more` : ''}`)
    this.#tell({ txid, changes })
    if (isIncomplete) queueMicrotask(() => void this.refresh().catch(() => {}))
  }

  #save() {
    this.#copy?.save(() => {
      const tables = Object.fromEntries([...this.#collections].map(([name, { rows }]) => [name, [...rows.values()]]))
      const keys = Object.fromEntries([...this.#collections].map(([name, { key }]) => [name, key]))
      return { cursor: this.#cursor!, tables, keys }
    })
  }
}

/** Keeps collections of these tables' rows. */
export const live = (tables: Tables, options: Options) => new Live(tables, options)
