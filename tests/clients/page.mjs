// A page in Chromium, with the browser build of supabase-js: rows appear, change and go by themselves.
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { launch } from './chromium.mjs'
import { RELAY, run, token, write } from './harness.mjs'

const PAGE = `<!doctype html><meta charset="utf-8"><title>Notes</title>
<p id="status"></p><ul id="notes"></ul>
<script src="/supabase.js"></script>
<script>
  const { url, key, token } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)))
  const notes = new Map()
  const client = supabase.createClient(url, key, { accessToken: async () => token })
  client.realtime.setAuth().then(() => client.channel('notes')
    .on('postgres_changes', { event: '*', schema: 'public', table: 'notes' }, (change) => {
      if (change.eventType === 'DELETE') notes.delete(change.old.id)
      else notes.set(change.new.id, change.new.title)
      document.getElementById('notes').replaceChildren(...[...notes.values()].map((title) => {
        const item = document.createElement('li')
        item.textContent = title
        return item
      }))
    })
    .subscribe((status) => { document.getElementById('status').textContent = status }))
</script>`

async function serve() {
  const entry = dirname(createRequire(import.meta.url).resolve('@supabase/supabase-js'))
  const client = readFileSync(join(entry, 'umd/supabase.js'))
  const server = createServer((request, response) => {
    const script = request.url === '/supabase.js'
    response.setHeader('content-type', script ? 'text/javascript' : 'text/html')
    response.end(script ? client : PAGE)
  })
  await new Promise((listening) => server.listen(0, '127.0.0.1', listening))
  return `http://127.0.0.1:${server.address().port}/`
}

await run({
  async shows_rows_as_they_come_change_and_go() {
    const chrome = await launch()
    try {
      const page = await chrome.newPage()
      page.on('pageerror', (error) => console.error(error))
      page.on('console', (message) => console.error(message.text()))
      const access = new URLSearchParams({ url: RELAY, key: await token('anon'), token: await token('alice') })
      await page.goto(`${await serve()}#${access}`)
      const shows = (...titles) => page.waitForFunction(
        (expected) => [...document.querySelectorAll('li')].map((item) => item.textContent).join() === expected,
        titles.join(),
      )
      await page.getByText('SUBSCRIBED', { exact: true }).waitFor()
      await write(`insert into notes (id, owner, title) values
        (1, 'bbbbbbbb-0000-4000-8000-000000000002', 'of bob'), (2, null, 'of all')`)
      await shows('of all')
      await write(`insert into notes (id, owner, title) values (3, 'aaaaaaaa-0000-4000-8000-000000000001', 'of alice')`)
      await shows('of all', 'of alice')
      await write(`update notes set title = title || '!'`)
      await shows('of all!', 'of alice!')
      await write('delete from notes where id < 3')
      await shows('of alice!')
    } finally {
      await chrome.close()
    }
  },
})
