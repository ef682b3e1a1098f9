// A copy of the collections in IndexedDB, for a start without a network. It is of one user, and is written whole with its cursor.
import type { Row } from './live.js'

export interface Copied {
  cursor: string
  tables: Record<string, Row[]>
  keys: Record<string, string[]>
}

/** Writes are put off by so many milliseconds, so that those of a moment are one. */
const DELAY = 500

const done = <T>(request: IDBRequest<T>) =>
  new Promise<T>((resolve, reject) => {
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(request.error)
  })

export class Copy {
  #database: Promise<IDBDatabase>
  #of: string | undefined
  #timer: ReturnType<typeof setTimeout> | undefined
  #make: (() => Copied) | undefined

  constructor(name: string) {
    const opening = indexedDB.open(name, 1)
    opening.onupgradeneeded = () => opening.result.createObjectStore('copies')
    this.#database = done(opening)
    this.#database.catch(() => {})
  }

  /** Turns to the copy of this user and request; returns it if there is one. Copies of others are removed. */
  async open(of: string): Promise<Copied | undefined> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#of = of
    try {
      const store = (await this.#database).transaction('copies', 'readwrite').objectStore('copies')
      const copied = await done<Copied | undefined>(store.get(of))
      if (!copied) store.clear()
      return copied
    } catch {
      return undefined
    }
  }

  save(make: () => Copied) {
    this.#make = make
    this.#timer ??= setTimeout(() => void this.#write(), DELAY)
  }

  async #write() {
    this.#timer = undefined
    try {
      const database = await this.#database
      const copied = this.#make?.()
      if (copied?.cursor && this.#of) database.transaction('copies', 'readwrite').objectStore('copies').put(copied, this.#of)
    } catch {}
  }

  close() {
    if (this.#timer) void this.#write().then(async () => (await this.#database).close())
    else void this.#database.then((database) => database.close(), () => {})
    clearTimeout(this.#timer)
  }
}
