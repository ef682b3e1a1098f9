// What a script of this folder needs: orders to the test that started it, and inboxes to wait at instead of sleeping.
import { createInterface } from 'node:readline'

/** Longer than any client's reconnect, shorter than the test's own limit. */
const PATIENCE = 20_000

export const RELAY = process.env.RELAY_URL
/** The same relay behind a proxy whose connections `order('CUT')` drops. */
export const PROXY = process.env.PROXY_URL

const answers = []
createInterface({ input: process.stdin }).on('line', (line) => answers.shift()?.(line))

/** Tells the test to do something, and returns what it answers. */
export async function order(line) {
  const answer = await within(line, new Promise((resolve) => {
    answers.push(resolve)
    console.log(line)
  }))
  if (!answer.startsWith('DONE')) throw new Error(`${line}: ${answer}`)
  return answer.slice('DONE '.length)
}

/** Runs SQL; the order is one line. */
export const write = (sql) => order(`WRITE ${sql.replace(/\s+/g, ' ')}`)
/** Runs SQL, and returns the first value of the last row. */
export const read = (sql) => order(`READ ${sql.replace(/\s+/g, ' ')}`)
/** A token of alice or bob (authenticated) or of the role anon, that ends in so many seconds. */
export const token = (who, seconds = 3600) => order(`TOKEN ${who} ${seconds}`)

/** Fails when the promise takes too long. */
export async function within(what, promise) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`never came: ${what}`)), PATIENCE)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

/** Messages in order of arrival, until the test consumes them. */
export class Inbox {
  #came = []
  #waiting = []

  constructor(name) {
    this.name = name
  }

  /** How many came that nobody asked for yet. */
  get size() {
    return this.#came.length
  }

  put(item) {
    const next = this.#waiting.shift()
    if (next) next(item)
    else this.#came.push(item)
  }

  next() {
    if (this.#came.length > 0) return this.#came.shift()
    return within(`the next of ${this.name}`, new Promise((resolve) => this.#waiting.push(resolve)))
  }

  /** The next `count` of them. */
  async take(count) {
    const items = []
    while (items.length < count) items.push(await this.next())
    return items
  }

  /** The first that `fits`; those before it are dropped. */
  async until(fits) {
    for (;;) {
      const item = await this.next()
      if (fits(item)) return item
    }
  }
}

/** Runs the scenario that the command line names, and ends the process. */
export async function run(scenarios) {
  const name = process.argv[2]
  if (!Object.hasOwn(scenarios, name)) throw new Error(`no scenario ${name}`)
  await scenarios[name]()
  process.exit(0)
}
