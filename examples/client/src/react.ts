// React: one Live for a component, however often React mounts it.
import { useCallback, useEffect, useState, useSyncExternalStore } from 'react'
import { Live, type Options, type Row, type Status, type Tables } from './live.js'

/**
 * Makes a Live for as long as the component is mounted. StrictMode mounts twice: the first one is closed by its own effect.
 * `undefined` until the first effect has run. Give `tables` and `options` that stay the same, or a `name` that changes with them.
 */
export function useLive(tables: Tables, options: Options, name: unknown = options.url): Live | undefined {
  const [made, setMade] = useState<Live>()
  useEffect(() => {
    const own = new Live(tables, options)
    setMade(own)
    return () => {
      own.close()
      setMade(undefined)
    }
    // The name stands for tables and options, which are new objects at each rendering.
  }, [name])
  return made
}

const none: readonly never[] = []
const loading: Status = { state: 'loading' }

/** The rows of a table; rendered anew when they change. */
export function useRows<T extends Row = Row>(live: Live | undefined, table: string): readonly T[] {
  const subscribe = useCallback((listener: () => void) => live?.subscribe(listener) ?? (() => {}), [live])
  const rows = () => live?.rows<T>(table) ?? (none as readonly T[])
  return useSyncExternalStore(subscribe, rows, rows)
}

/** Whether they follow the table, and if not, why. */
export function useStatus(live: Live | undefined): Status {
  const subscribe = useCallback((listener: () => void) => live?.subscribe(listener) ?? (() => {}), [live])
  const status = () => live?.status ?? loading
  return useSyncExternalStore(subscribe, status, status)
}
