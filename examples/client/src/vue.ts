// Vue: a Live that ends with its component, and refs that follow it.
import { getCurrentScope, onScopeDispose, shallowRef, type ShallowRef } from 'vue'
import { Live, type Options, type Row, type Status, type Tables } from './live.js'

const ending = (end: () => void) => getCurrentScope() && onScopeDispose(end)

/** Makes a Live for as long as the component, or the scope, is there. */
export function useLive(tables: Tables, options: Options): Live {
  const live = new Live(tables, options)
  ending(() => live.close())
  return live
}

/** The rows of a table. */
export function useRows<T extends Row = Row>(live: Live, table: string): Readonly<ShallowRef<readonly T[]>> {
  const rows = shallowRef<readonly T[]>(live.rows<T>(table))
  ending(live.subscribe(() => (rows.value = live.rows<T>(table))))
  return rows
}

/** Whether they follow the table, and if not, why. */
export function useStatus(live: Live): Readonly<ShallowRef<Status>> {
  const status = shallowRef(live.status)
  ending(live.subscribe(() => (status.value = live.status)))
  return status
}
