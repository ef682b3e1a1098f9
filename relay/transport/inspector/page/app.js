// The frame of the page: signing in, the list of panes, and the state of the relay above them.
import { ask, hasToken, repeat, signIn, signOut } from './api.js'
import { charts, sample } from './charts.js'
import { changes } from './changes.js'
import { clients, topics } from './clients.js'
import { console as subscribing } from './console.js'
import { database, settings } from './database.js'
import { duration, el, problem } from './elements.js'
import { policies } from './policies.js'
import { why } from './why.js'

const PANES = [why, clients, topics, changes, subscribing, policies, database, settings, charts]

function start() {
  document.body.replaceChildren(hasToken() ? frame() : door())
}

/** The page before a token is given: nothing of the relay is on it. */
function door() {
  const input = el('input', { type: 'password', id: 'token', autocomplete: 'off', spellcheck: 'false', required: true, placeholder: 'eyJ… or sb_secret_…' })
  const said = el('div')
  const enter = async (event) => {
    event.preventDefault()
    try {
      await signIn(input.value)
      start()
    } catch (error) {
      said.replaceChildren(problem(error))
      input.select()
    }
  }
  const form = el('form', { class: 'door', submit: enter },
    el('h1', {}, el('span', { class: 'mark' }), 'relay inspector'),
    el('p', {}, 'Why a change was delivered or not, who is connected, and how the relay is doing.'),
    el('label', { for: 'token' }, 'Token of the role ', el('code', {}, 'service_role'), ', or a secret key'),
    input, said,
    el('button', { class: 'main' }, 'Sign in'),
    el('p', { class: 'hint' }, 'It stays in this tab. ', el('code', {}, 'relay token --role service_role'), ' makes one.'))
  queueMicrotask(() => input.focus())
  return form
}

/** The page after that: the panes. */
function frame() {
  const state = el('span', { class: 'state' })
  const place = el('main', { tabindex: '-1' })
  const links = PANES.map((pane) => el('a', { href: `#${pane.id}` }, pane.title))
  let leave = () => {}
  const show = () => {
    const pane = PANES.find((one) => `#${one.id}` === location.hash.split('?')[0]) ?? why
    leave()
    links.forEach((link, index) => {
      if (PANES[index] === pane) link.setAttribute('aria-current', 'page')
      else link.removeAttribute('aria-current')
    })
    links[PANES.indexOf(pane)].scrollIntoView({ block: 'nearest', inline: 'center' })
    const room = el('section', { class: 'pane', 'data-pane': pane.id }, el('header', {}, el('h2', {}, pane.title), el('p', {}, pane.about)))
    place.replaceChildren(room)
    scrollTo(0, 0)
    leave = pane.show(room) ?? (() => {})
  }
  const stop = repeat(5000, async () => {
    try {
      const overview = await ask('overview')
      state.replaceChildren(overview.unready ? `not ready: ${overview.unready}` : `ready · ${overview.version} · up ${duration(overview.uptime_seconds)}`)
      state.dataset.tone = overview.unready ? 'bad' : 'good'
    } catch (error) {
      if (error.status === 401 || error.status === 403) return leaveAll(error)
      state.replaceChildren(error.message)
      state.dataset.tone = 'bad'
    }
  })
  const sampling = repeat(2000, () => sample().catch(() => {}))
  const leaveAll = (error) => {
    leave()
    stop()
    sampling()
    removeEventListener('hashchange', show)
    signOut()
    start()
    if (error) document.querySelector('.door div').replaceChildren(problem(error))
  }
  addEventListener('hashchange', show)
  queueMicrotask(show)
  return el('div', { class: 'frame' },
    el('header', { class: 'top' }, el('a', { class: 'brand', href: '#why' }, el('span', { class: 'mark' }), 'relay'), state,
      el('button', { type: 'button', class: 'quiet', click: () => leaveAll() }, 'Sign out')),
    el('nav', { 'aria-label': 'Panes' }, links),
    place)
}

start()
