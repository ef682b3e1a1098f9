// The React hook of examples/client in Chromium, under StrictMode, which mounts everything twice.
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { join } from 'node:path'
import { launch } from './chromium.mjs'
import { compile } from './compiled.mjs'
import { RELAY, run, token, write } from './harness.mjs'

const PAGE = `<!doctype html><meta charset="utf-8"><div id="root"></div>
<script type="importmap">{ "imports": { "react": "/react.js" } }</script>
<script type="module">
  import { createElement, createRoot, StrictMode, useState } from '/react.js'
  import { useLive, useRows, useStatus } from '/client/react.js'

  function Notes() {
    const data = useLive(['notes'], Object.fromEntries(new URLSearchParams(location.hash.slice(1))))
    const [rows, status] = [useRows(data, 'notes'), useStatus(data)]
    return createElement('p', null, status.state + ': ' + rows.map(({ title }) => title).join())
  }
  function App() {
    const [isThere, set] = useState(true)
    globalThis.set = set
    return isThere && createElement(Notes)
  }
  createRoot(document.getElementById('root')).render(createElement(StrictMode, null, createElement(App)))
</script>`

/** React as one module: its files are of the older kind, each a function of `require`. */
function react(folder) {
  const files = {
    react: 'react/cjs/react.development.js',
    scheduler: 'scheduler/cjs/scheduler.development.js',
    'react-dom': 'react-dom/cjs/react-dom.development.js',
    'react-dom/client': 'react-dom/cjs/react-dom-client.development.js',
  }
  const modules = Object.entries(files).map(([name, file]) => {
    const path = join(folder, 'node_modules', file)
    return `${JSON.stringify(name)}: (require, module, exports) => {${readFileSync(path, 'utf8')}\n}`
  })
  return `globalThis.process = { env: { NODE_ENV: 'development' } }
    const files = {${modules.join(',')}}
    const made = {}
    function require(name) {
      if (!made[name]) files[name](require, made[name] = { exports: {} }, made[name].exports)
      return made[name].exports
    }
    export const { createElement, StrictMode, useCallback, useEffect, useState, useSyncExternalStore } = require('react')
    export const { createRoot } = require('react-dom/client')`
}

async function serve() {
  const folder = compile()
  const script = react(folder)
  const server = createServer(({ url }, response) => {
    response.setHeader('content-type', url === '/' ? 'text/html' : 'text/javascript')
    if (url === '/') response.end(PAGE)
    else if (url === '/react.js') response.end(script)
    else if (url.startsWith('/client/')) response.end(readFileSync(join(folder, url.replace('/client/', ''))))
    else response.writeHead(404).end()
  })
  await new Promise((listening) => server.listen(0, '127.0.0.1', listening))
  return `http://127.0.0.1:${server.address().port}/`
}

await run({
  async has_one_connection_under_strict_mode_and_none_after_the_component() {
    const chrome = await launch()
    try {
      const page = await chrome.newPage()
      page.on('console', (message) => console.error(message.text()))
      const open = new Set()
      page.on('websocket', (socket) => {
        open.add(socket)
        socket.on('close', () => open.delete(socket))
      })
      const shows = (text) => page.waitForFunction((expected) => document.getElementById('root').textContent === expected, text)
      await write(`insert into notes (id, owner, title) values (1, null, 'one')`)
      await page.goto(`${await serve()}#${new URLSearchParams({ url: RELAY, token: await token('alice') })}`)
      await shows('live: one')
      await write(`update notes set title = 'two'`)
      await shows('live: two')
      const counts = async (expected) => {
        for (const end = Date.now() + 10_000; open.size !== expected; ) {
          if (Date.now() > end) throw new Error(`${open.size} sockets instead of ${expected}`)
          await page.waitForTimeout(20)
        }
      }
      await counts(1)
      await page.evaluate(() => globalThis.set(false))
      await shows('')
      await counts(0)
      await page.evaluate(() => globalThis.set(true))
      await shows('live: two')
      await counts(1)
    } finally {
      await chrome.close()
    }
  },
})
