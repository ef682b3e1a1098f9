// TanStack Query: the rows of a Live as queries, for applications that read everything by useQuery.
import type { QueryClient, QueryKey } from '@tanstack/query-core'
import type { Live, Row } from './live.js'

/** What useQuery takes: `useQuery(liveQuery(live, 'todos'))`. Its rows are put there by `follow`. */
export const liveQuery = <T extends Row = Row>(live: Live, table: string) => ({
  queryKey: ['live', table] as QueryKey,
  staleTime: Infinity,
  queryFn: async (): Promise<readonly T[]> => {
    if (live.status.state === 'loading') await firstRows(live)
    return live.rows<T>(table)
  },
})

/** Puts the rows of these tables into the cache as they change, and invalidates these further queries. Returns what ends it. */
export function follow(client: QueryClient, live: Live, tables: string[], invalidates: QueryKey[] = []): () => void {
  let before: unknown[] = []
  const put = () => {
    if (live.status.state === 'loading') return
    const now = tables.map((table) => live.rows(table))
    if (now.every((rows, number) => rows === before[number])) return
    before = now
    tables.forEach((table, number) => client.setQueryData(['live', table], now[number]))
    invalidates.forEach((queryKey) => void client.invalidateQueries({ queryKey }))
  }
  put()
  return live.subscribe(put)
}

const firstRows = (live: Live) =>
  new Promise<void>((resolve, reject) => {
    const stop = live.subscribe(() => {
      const { state, why } = live.status
      if (state === 'loading') return
      stop()
      if (state === 'refused') reject(new Error(why))
      else resolve()
    })
  })
