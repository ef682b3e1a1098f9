// The page examples/todo.html in Chromium, on the table of examples/todo.sql.
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { join } from 'node:path'
import { launch } from './chromium.mjs'
import { compile, EXAMPLES } from './compiled.mjs'
import { order, PROXY, run, token, write } from './harness.mjs'

const ALICE = 'aaaaaaaa-0000-4000-8000-000000000001'

/** Serves the page, and what it imports, as `make demo` does. */
async function serve() {
  const folder = compile()
  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url, 'http://page')
    const isPage = pathname === '/todo.html'
    response.setHeader('content-type', isPage ? 'text/html' : 'text/javascript')
    response.end(readFileSync(isPage ? join(EXAMPLES, 'todo.html') : join(folder, pathname.replace('/client/dist/', ''))))
  })
  await new Promise((listening) => server.listen(0, '127.0.0.1', listening))
  return `http://127.0.0.1:${server.address().port}/todo.html`
}

/** The page of Alice with three todos, in a browser of its own. */
async function browse(play, prepare = async () => {}) {
  await write(readFileSync(join(EXAMPLES, 'todo.sql'), 'utf8').replace(/^--.*$/gm, ''))
  await write(`insert into todos (user_id, title) values ('${ALICE}', 'one'), ('${ALICE}', 'two'), ('${ALICE}', 'three')`)
  const chrome = await launch()
  const said = []
  try {
    const page = await chrome.newPage()
    page.on('pageerror', (error) => said.push(String(error)))
    page.on('console', (message) => console.error(message.text()))
    await prepare(page)
    await page.goto(`${await serve()}?debug#${new URLSearchParams({ url: PROXY, token: await token('alice') })}`)
    const shows = (state, ...titles) =>
      page.waitForFunction(
        ([state, titles]) =>
          document.querySelector('output').dataset.state === state &&
          [...document.querySelectorAll('li')].map((item) => (item.className.includes('done') ? '✓' : '') + item.textContent).join() === titles,
        [state, titles.join()],
      )
    await shows('live', 'one', 'two', 'three')
    await play(page, shows)
  } finally {
    await chrome.close()
  }
  if (said.length) throw new Error(said.join('\n'))
}

/** Refuses all sockets of the page, as a proxy does that does not know them. */
const withoutSockets = (page) => page.routeWebSocket(/./, (socket) => socket.close({ code: 1011 }))
const withoutStreams = (page) =>
  page.route(/\/changes\?/, (route) => (route.request().headers().accept === 'text/event-stream' ? route.abort() : route.continue()))

await run({
  async shows_what_was_updated_and_deleted_while_the_relay_was_down() {
    await browse(async (page, shows) => {
      await page.evaluate(() => { globalThis.isTheSamePage = true })
      await order('STOP')
      await shows('offline', 'one', 'two', 'three')
      await write(`update todos set done = true where title = 'one'; delete from todos where title = 'two'`)
      await order('START')
      await shows('live', '✓one', 'three')
      await write(`insert into todos (user_id, title) values ('${ALICE}', 'four')`)
      await shows('live', '✓one', 'three', 'four')
      if (!(await page.evaluate(() => globalThis.isTheSamePage))) throw new Error('the page was loaded again')
    })
  },

  async shows_its_copy_without_a_relay_after_a_reload_and_mends_it() {
    await browse(async (page, shows) => {
      await write(`delete from todos where title = 'two'`)
      await shows('live', 'one', 'three')
      const copied = () => page.evaluate(async () => {
        const database = await new Promise((resolve) => (indexedDB.open('todos').onsuccess = ({ target }) => resolve(target.result)))
        const all = database.transaction('copies').objectStore('copies').getAll()
        const [copy] = await new Promise((resolve) => (all.onsuccess = () => resolve(all.result)))
        database.close()
        return copy?.tables.todos.length
      })
      while ((await copied()) !== 2) await page.waitForTimeout(20)
      await order('STOP')
      await page.reload()
      await shows('offline', 'one', 'three')
      await write(`update todos set done = true where title = 'one'`)
      await order('START')
      await shows('live', '✓one', 'three')
    })
  },

  async goes_on_where_the_browser_lets_no_socket_through() {
    await browse(async (page, shows) => {
      await write(`update todos set done = true where title = 'one'`)
      await shows('live', '✓one', 'two', 'three')
    }, withoutSockets)
  },

  async goes_on_where_the_browser_lets_no_stream_through_either() {
    await browse(async (page, shows) => {
      for (const title of ['two', 'three']) {
        await write(`update todos set done = true where title = '${title}'`)
        if (title === 'two') await shows('live', 'one', '✓two', 'three')
      }
      await shows('live', 'one', '✓two', '✓three')
    }, async (page) => {
      await withoutSockets(page)
      await withoutStreams(page)
    })
  },
})
