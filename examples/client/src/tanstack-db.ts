// TanStack DB: a table of a Live as a collection. `createCollection(liveCollection(live, 'todos', { onInsert }))`
import type { CollectionConfig, SyncConfig } from '@tanstack/db'
import type { Live, Row } from './live.js'

type Written = { txid: string | number | bigint } | void
type Handler = (mutations: { original: Row; modified: Row; changes: Partial<Row> }[]) => Promise<Written>

export interface Handlers {
  /** Each writes as the application does, and returns the `txid` of `pg_current_xact_id()`: the optimistic state stays until it has come. */
  onInsert?: Handler
  onUpdate?: Handler
  onDelete?: Handler
}

/** The options of a collection that follows a table. */
export function liveCollection(live: Live, table: string, handlers: Handlers = {}): CollectionConfig<Row, string> {
  const sync: SyncConfig<Row, string>['sync'] = ({ begin, write, commit, markReady }) => {
    let had = new Map<string, Row>()
    const follow = () => {
      if (live.status.state === 'loading') return
      const has = new Map(live.rows(table).map((row) => [live.keyOf(table, row), row]))
      begin()
      for (const [key, value] of had) if (!has.has(key)) write({ type: 'delete', value })
      for (const [key, value] of has) {
        if (!had.has(key)) write({ type: 'insert', value })
        else if (had.get(key) !== value) write({ type: 'update', value })
      }
      commit()
      had = has
      markReady()
    }
    follow()
    return live.subscribe(follow)
  }
  const written = (handler: Handler | undefined) =>
    handler &&
    (async ({ transaction }: { transaction: { mutations: any[] } }) => {
      const told = await handler(transaction.mutations)
      if (told) await live.awaitTxId(told.txid)
    })
  const config = {
    id: `live ${table}`,
    getKey: (row: Row) => live.keyOf(table, row),
    sync: { sync, rowUpdateMode: 'full' as const },
    onInsert: written(handlers.onInsert),
    onUpdate: written(handlers.onUpdate),
    onDelete: written(handlers.onDelete),
  }
  return Object.fromEntries(Object.entries(config).filter(([, value]) => value !== undefined)) as unknown as CollectionConfig<Row, string>
}
