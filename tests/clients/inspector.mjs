// The inspector of the relay in Chromium: signing in, and each of its panes.
import { launch } from './chromium.mjs'
import { RELAY, read, run, token, write } from './harness.mjs'

const ALICE = 'aaaaaaaa-0000-4000-8000-000000000001'
const BOB = 'bbbbbbbb-0000-4000-8000-000000000002'
const PANES = ['why', 'clients', 'topics', 'changes', 'console', 'policies', 'database', 'settings', 'charts']

/** A page of the inspector, signed in unless `isSignedIn` is false. Fails on errors in the page, and on a token in an address. */
async function browse(play, { isSignedIn = true, ...options } = {}) {
  await write(`create table orders (id int primary key, owner uuid, state text);
    alter table orders enable row level security;
    create policy own on orders for select to authenticated using (owner = auth.uid());
    create policy shown on orders as restrictive for select to authenticated using (state <> 'hidden');
    grant select on orders to authenticated, service_role;
    select relay.watch('orders');
    insert into orders values (1, '${ALICE}', 'open'), (2, '${ALICE}', 'hidden'), (3, '${BOB}', 'open')`)
  const service = await token('service_role')
  const secrets = [service]
  const chrome = await launch()
  const said = []
  try {
    const context = await chrome.newContext(options)
    const page = await context.newPage()
    page.on('pageerror', (error) => said.push(String(error)))
    // What the policy of the page forbids is told here. A refused sign-in is, too.
    page.on('console', (message) => { if (message.type() === 'error' && !message.text().includes('status of 40')) said.push(message.text()) })
    page.on('request', (request) => {
      if (!request.url().startsWith(RELAY)) said.push(`asked ${request.url()}`)
      if (secrets.some((secret) => request.url().includes(secret))) said.push(`a token in ${request.url()}`)
    })
    await page.goto(`${RELAY}/inspector`)
    const signIn = async (given) => {
      await page.getByLabel('Token of the role').fill(given)
      await page.getByRole('button', { name: 'Sign in' }).click()
    }
    if (isSignedIn) {
      await signIn(service)
      await page.getByRole('navigation').waitFor()
    }
    const go = (name) => page.getByRole('link', { name, exact: true }).click()
    await play({ page, go, signIn, service, secrets })
  } finally {
    await chrome.close()
  }
  if (said.length) throw new Error(said.join('\n'))
}

/** Waits until the element has this text. */
async function has(locator, text) {
  const end = Date.now() + 20_000
  for (;;) {
    const found = (await locator.allInnerTexts()).join('\n')
    if (found.includes(text)) return found
    if (Date.now() > end) throw new Error(`${text} is not in: ${found}`)
    await new Promise((passed) => setTimeout(passed, 20))
  }
}

function check(is, why) {
  if (!is) throw new Error(why)
}

await run({
  async lets_in_the_service_role_alone_and_keeps_its_token_in_the_tab() {
    await browse(async ({ page, signIn, service, secrets }) => {
      for (const [given, why] of [['nonsense', 'token'], [await token('alice'), 'authenticated'], [await token('service_role', -5), 'expired']]) {
        secrets.push(given)
        await signIn(given)
        await has(page.getByRole('alert'), why)
        check(!(await page.content()).includes('orders'), 'a table is named without a right to see it')
      }
      await signIn(service)
      await page.getByRole('navigation').waitFor()
      await page.reload()
      await page.getByRole('navigation').waitFor()
      check(!page.url().includes('eyJ'), page.url())
      check((await page.evaluate(() => localStorage.length)) === 0, 'it outlives the tab')
      await page.getByRole('button', { name: 'Sign out' }).click()
      await page.getByLabel('Token of the role').waitFor()
      check((await page.evaluate(() => sessionStorage.length)) === 0, 'it outlives the session')
      await page.reload()
      await page.getByLabel('Token of the role').waitFor()
    }, { isSignedIn: false })
  },

  async says_why_a_row_is_delivered_or_not_by_key_change_user_and_token() {
    await browse(async ({ page, secrets }) => {
      const verdict = page.locator('.verdict')
      const ask = () => page.getByRole('button', { name: 'Why?' }).click()
      await page.getByPlaceholder('public.todos').fill('orders')
      await page.getByLabel('sub').fill(ALICE)
      await page.getByText('As JSON', { exact: true }).click()
      const row = (owner, state) => JSON.stringify({ id: 7, owner, state })
      for (const [given, ...words] of [
        [row(ALICE, 'open'), 'Would receive', 'This row, by own'],
        [row(ALICE, 'hidden'), 'Would not receive', 'a restrictive policy keeps the row back', 'shown'],
        [row(BOB, 'open'), 'Would not receive', 'no permissive policy lets the row through', ALICE],
      ]) {
        await page.getByLabel('The row as JSON').fill(given)
        await ask()
        for (const word of words) await has(verdict, word)
      }
      await page.getByLabel('The row as JSON').fill('not a row')
      await ask()
      await has(page.getByRole('alert'), 'row: a JSON object of all columns')
      // The login of this relay may not read tables, and says so.
      await page.getByText('By key', { exact: true }).click()
      await page.getByLabel('Key of the row').fill('1')
      await ask()
      await has(page.getByRole('alert'), 'give the row itself')
      await page.getByText('A recent change', { exact: true }).click()
      await has(page.locator('select[name=change]'), 'INSERT id 3')
      await page.locator('select[name=change]').selectOption({ index: 2 })
      await ask()
      await has(verdict, 'This row, by own')
      await page.getByText('A token', { exact: true }).click()
      const bob = await token('bob')
      secrets.push(bob)
      await page.getByRole('textbox', { name: 'Token' }).fill(bob)
      await ask()
      await has(verdict, `${BOB} as authenticated`)
      await has(verdict, 'no permissive policy lets the row through')
      await page.getByText('Claims', { exact: true }).click()
      await page.getByRole('textbox', { name: 'Claims' }).fill('{"role": "anon"}')
      await ask()
      await has(verdict, 'grant select on public.orders to anon')
      await page.getByPlaceholder('public.todos').fill('ordres')
      await ask()
      await has(verdict, 'there is public.orders')
    })
  },

  async shows_changes_as_they_come_and_what_a_user_gets_of_them() {
    await browse(async ({ page, go, secrets }) => {
      await go('Changes')
      await has(page.locator('.tools'), 'live')
      await write(`insert into orders values (11, '${ALICE}', 'open'), (12, '${BOB}', 'open')`)
      const events = page.locator('.event')
      await has(events, '"id":12')
      await page.getByLabel('Search').fill(BOB)
      check((await events.count()) === 1, 'only the row of Bob is like that')
      await page.getByLabel('Search').fill('')
      await page.getByRole('button', { name: 'Pause' }).click()
      await write(`update orders set state = 'done' where id = 11`)
      await page.getByRole('button', { name: 'Go on (1)' }).waitFor()
      check(!(await events.allInnerTexts()).join().includes('done'), 'it is paused')
      await page.getByRole('button', { name: 'Go on (1)' }).click()
      await has(events, 'done')
      await events.first().click()
      await page.getByRole('button', { name: 'Who receives this row?' }).first().click()
      await page.getByRole('button', { name: 'Why?' }).click()
      await has(page.locator('.answer'), 'Nobody follows this table')
      await go('Console')
      const alice = await token('alice')
      secrets.push(alice)
      await page.getByLabel('Token or claims').fill(alice)
      await has(page.locator('.claims'), `${ALICE} as authenticated, until`)
      await page.getByPlaceholder('public.todos').fill('orders')
      await page.getByRole('button', { name: 'Subscribe' }).click()
      await has(page.locator('.tools'), 'live')
      await write(`insert into orders values (21, '${BOB}', 'open'); insert into orders values (22, '${ALICE}', 'hidden'); insert into orders values (23, '${ALICE}', 'open')`)
      check(!(await has(events, '"id":23')).match(/"id":2[12]/), 'a policy hides these rows from Alice')
      await page.getByLabel('Token or claims').fill(`{"sub": "${ALICE}", "org": "it's"}`)
      await has(page.locator('.claims'), `relay token --sub '${ALICE}' --claims '{"org":"it'\\''s"}'`)
    })
  },

  async lists_who_is_connected_to_what_and_how_tables_are_decided() {
    await browse(async ({ page, go, service }) => {
      const end = new AbortController()
      const alice = await token('alice')
      const stream = await fetch(`${RELAY}/realtime/v1/changes?tables=orders&orders.filter=id=gt.5`, { signal: end.signal, headers: { authorization: `Bearer ${alice}`, accept: 'text/event-stream' } })
      check(stream.status === 200, `the stream is answered with ${stream.status}`)
      await go('Clients')
      const card = page.locator('details.one')
      await has(card, ALICE)
      await card.first().locator('summary').click()
      await has(card, 'public.orders where')
      await page.getByLabel('Search').fill('bbbb')
      await has(page.locator('.list'), 'No client is like that.')
      await page.getByLabel('Search').fill('')
      await has(card, ALICE)
      // Held until here: a body that nobody holds is cancelled.
      check(!stream.bodyUsed, 'nobody reads it')
      end.abort()
      await has(page.locator('.list'), 'Nobody is connected.')
      await go('Policies')
      const orders = page.locator('details.one', { hasText: 'public.orders' })
      await has(orders, 'compiled')
      await orders.locator('summary').first().click()
      await has(orders, "state <> 'hidden'")
      await go('Database')
      await has(page.locator('.checks'), 'orders is watched')
      await write('alter table orders disable trigger all')
      await page.getByRole('button', { name: 'Check again' }).click()
      await has(page.locator('.checks'), 'its triggers are missing or disabled')
      await go('Settings')
      const settings = await has(page.locator('table'), '--jwt-secret')
      check(settings.includes('(set, not shown)') && !settings.includes('a-secret-for-tests'), 'a secret is shown')
      check(!settings.includes('postgres://postgres'), 'an address with a password may be shown')
      await go('Charts')
      await has(page.locator('.chart').first(), '/s')
      check((await page.locator('.chart').count()) >= 8, 'charts are missing')
      // A sign-in that ends: the page says so, and shows nothing any more.
      await page.evaluate(() => sessionStorage.clear())
      await page.reload()
      await page.getByLabel('Token of the role').waitFor()
      check((await read(`select '${service}' <> ''`)) === 't', 'the relay goes on')
    })
  },

  async fits_a_phone_by_day_and_by_night() {
    for (const colorScheme of ['light', 'dark']) {
      if (colorScheme === 'dark') await write('drop table orders')
      await browse(async ({ page, go }) => {
        for (const pane of PANES) {
          await go(pane[0].toUpperCase() + pane.slice(1))
          await page.locator(`[data-pane=${pane}]`).waitFor()
          if (pane === 'database') await has(page.locator('.checks'), 'ok')
          if (pane === 'settings') await has(page.locator('table'), '--jwt-secret')
          if (pane === 'charts') await has(page.locator('.chart').first(), '/s')
          const wide = await page.evaluate(() => document.documentElement.scrollWidth)
          check(wide <= 390, `${pane} is ${wide} pixels wide`)
          const contrast = await page.evaluate(lowest)
          check(contrast.ratio >= 4.5, `${pane}, ${colorScheme}: ${contrast.text} has a contrast of ${contrast.ratio}`)
        }
      }, { viewport: { width: 390, height: 844 }, colorScheme, isMobile: true, hasTouch: true })
    }
  },
})

/** The text with the least contrast to what is behind it, as WCAG counts. Runs in the page. */
function lowest() {
  const parts = (color) => color.match(/[\d.]+/g).map(Number)
  const light = (color) => {
    const [red, green, blue] = parts(color).slice(0, 3).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
  }
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor
      if ((parts(color)[3] ?? 1) === 1) return color
    }
    return 'rgb(255, 255, 255)'
  }
  let found = { ratio: 21, text: '' }
  for (const element of document.querySelectorAll('main *, header *, nav *')) {
    const text = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()).map((node) => node.data).join()
    if (!text || element.disabled || !element.checkVisibility()) continue
    const [one, other] = [light(getComputedStyle(element).color), light(behind(element))]
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)
    if (ratio < found.ratio) found = { ratio, text }
  }
  return found
}
