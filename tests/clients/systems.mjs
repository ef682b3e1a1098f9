// The page of examples/systems in Chromium: who sees what change, by the buttons that run SQL.
import { launch } from './chromium.mjs'
import { run } from './harness.mjs'

/** Opens the page in a browser of its own, closed afterwards; fails on an error in the page. */
async function browse(play) {
  const chrome = await launch()
  const errors = []
  try {
    await play(async () => {
      const page = await chrome.newPage()
      page.on('pageerror', (error) => errors.push(String(error)))
      await page.goto(process.env.PAGE_URL)
      await live(page)
      return page
    })
  } finally {
    await chrome.close()
  }
  if (errors.length) throw new Error(errors.join('\n'))
}

const live = (page) => page.waitForFunction(() => {
  const rows = [...document.querySelectorAll('.panel')].map((panel) => panel.querySelectorAll('.body li').length)
  return document.querySelectorAll('.chip[data-state="live"]').length === 2 && rows.every((count) => count > 6)
})

/** The screen on the left (0) or right (1), of this person if one is named. */
async function screen(page, index, person) {
  const panel = page.locator('.panel').nth(index)
  if (person) await panel.getByRole('radio', { name: person }).click()
  return panel
}

/** Waits until the parts of a screen below a title are these, as text. */
async function shows(panel, title, ...texts) {
  const find = (root, [wanted, expected]) => {
    const heading = [...root.querySelectorAll('h3')].find((one) => one.textContent.startsWith(wanted))
    const below = heading?.nextElementSibling
    const found = below?.tagName === 'UL' ? [...below.children].map((item) => item.textContent) : [below?.textContent]
    return JSON.stringify(found) === JSON.stringify(expected) ? true : JSON.stringify(found)
  }
  const end = Date.now() + 20_000
  for (;;) {
    const found = await panel.evaluate(find, [title, texts])
    if (found === true) return
    if (Date.now() > end) throw new Error(`${title}: ${found} instead of ${JSON.stringify(texts)}`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

/** Presses a button, and waits until its statement has reached these people, or was refused for this reason. */
async function press(page, id, ...expected) {
  const card = page.locator('.statement', { has: page.locator(`[data-id="${id}"]`) })
  await card.locator('button').click()
  await page.waitForFunction((name) => !document.querySelector(`[data-id="${name}"]`).disabled, id)
  const end = Date.now() + 20_000
  for (;;) {
    const texts = await card.locator('.reach span').allTextContents()
    const found = texts.filter((text) => !text.endsWith('–')).map((text) => text.split(' ✓')[0])
    if (JSON.stringify(found) === JSON.stringify(expected)) return
    if (Date.now() > end) throw new Error(`${id} reached ${found}, not ${expected}`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

function equal(found, expected) {
  if (found !== expected) throw new Error(`${found} instead of ${expected}`)
}

const ALL_ON = ['codeon', 'imageon', 'webon', 'xon']
const TWO_OFF = ['codeon', 'imageon', 'weboff', 'xoff']

await run({
  async shows_an_agent_that_is_switched_off_at_once_and_after_a_reload() {
    await browse(async (open) => {
      const page = await open()
      const [ana, ben] = [await screen(page, 0), await screen(page, 1)]
      await shows(ana, 'My agents', ...ALL_ON)
      await press(page, 'agents-off', 'Ana', 'Edda')
      await shows(ana, 'My agents', ...TWO_OFF)
      await ana.getByRole('alert').getByText('The agent “x” was switched off.').waitFor()
      await shows(ben, 'My agents', ...ALL_ON)
      equal(await ben.getByRole('alert').isVisible(), false)
      await page.reload()
      await live(page)
      await shows(ana, 'My agents', ...TWO_OFF)
      await press(page, 'agents-on', 'Ana', 'Edda')
      await shows(ana, 'My agents', ...ALL_ON)
      await press(page, 'agents-refused', 'Refused: new row violates row-level security policy for table "agent_access"')
      await shows(ben, 'My agents', ...ALL_ON)
    })
  },

  async shows_people_until_the_conversation_with_them_ends() {
    await browse(async (open) => {
      const page = await open()
      const [ana, ben] = [await screen(page, 0), await screen(page, 1)]
      await shows(ana, 'People', 'Ana (you)online', 'Benonline', 'Chloeoffline')
      await press(page, 'status', 'Ana', 'Chloe', 'Edda')
      await shows(ana, 'People', 'Ana (you)online', 'Benonline', 'Chloeonline')
      await press(page, 'leave', 'Ana', 'Ben')
      await shows(ana, 'People', 'Ana (you)online', 'Chloeonline')
      await shows(ben, 'People', 'Ben (you)online', 'Devoffline', 'Eddaonline', 'Guestoffline')
      await press(page, 'disconnected', 'Ben', 'Edda')
      await shows(ben, 'People', 'Ben (you)offline', 'Devoffline', 'Eddaonline', 'Guestoffline')
      await press(page, 'return', 'Ana', 'Ben')
      await shows(ana, 'People', 'Ana (you)online', 'Benoffline', 'Chloeonline')
    })
  },

  async shows_metrics_and_alerts_to_the_admin_alone() {
    await browse(async (open) => {
      const page = await open()
      const [ana, edda] = [await screen(page, 0), await screen(page, 1, 'Edda')]
      await shows(edda, 'Metrics', '120documents', '953chunks', '112completed', '0failed')
      await press(page, 'failed', 'Edda')
      await shows(edda, 'Alerts', 'warningDocument 112 could not be read', 'infoAlerts begin here', 'logThe examples were loaded')
      await press(page, 'document')
      await press(page, 'refresh', 'Edda')
      await shows(edda, 'Metrics', '121documents', '965chunks', '112completed', '1failed')
      await shows(ana, 'Metrics', 'Only for admins')
      equal(await ana.getByRole('heading', { name: 'Alerts' }).count(), 0)
    })
  },

  async chats_in_two_windows_until_one_is_removed() {
    await browse(async (open) => {
      const [one, other] = [await open(), await open()]
      const [ana, ben] = [await screen(one, 0, 'Ana'), await screen(other, 0, 'Ben')]
      const write = async (panel, text) => {
        await panel.getByRole('textbox').fill(text)
        await panel.getByRole('textbox').press('Enter')
      }
      await write(ana, 'it\'s <b>"me"</b> $1 \\')
      await shows(ben, 'Chat', 'BenHow can I help?', 'Anait\'s <b>"me"</b> $1 \\')
      await write(ben, 'Yes?')
      await shows(ana, 'Chat', 'BenHow can I help?', 'Anait\'s <b>"me"</b> $1 \\', 'BenYes?')
      await press(one, 'removed', 'Ben')
      await shows(ben, 'Chat', 'Not in a session')
      await write(ana, 'Between us')
      await shows(ana, 'Chat', 'BenHow can I help?', 'Anait\'s <b>"me"</b> $1 \\', 'BenYes?', 'AnaBetween us')
      await shows(ben, 'Chat', 'Not in a session')
      await press(one, 'added', 'Ben')
      await shows(ben, 'Chat', 'BenHow can I help?', 'Anait\'s <b>"me"</b> $1 \\', 'BenYes?', 'AnaBetween us')
    })
  },
})
