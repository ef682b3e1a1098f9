// The database side: what doctor finds, the changelog, the refresh jobs and the webhooks. And the settings.
import { ask } from './api.js'
import { badge, bytes, duration, el, empty, number, problem, table, time } from './elements.js'

const ORDER = ['fault', 'note', 'good']
const TONES = { fault: 'bad', note: 'warn', good: 'good' }
const WORDS = { fault: 'fault', note: 'note', good: 'ok' }

export const database = {
  id: 'database',
  title: 'Database',
  about: 'What relay doctor finds, the changelog, the refreshes of materialized views, and webhooks.',
  show(room) {
    const place = el('div', { class: 'list' })
    const button = el('button', { type: 'button', click: () => read() }, 'Check again')
    const read = async () => {
      button.disabled = true
      place.replaceChildren(empty('Checking…'))
      try {
        place.replaceChildren(...shown(await ask('database')))
      } catch (error) {
        place.replaceChildren(problem(error))
      }
      button.disabled = false
    }
    room.append(el('div', { class: 'tools' }, button), place)
    read()
  },
}

function shown({ checks, health, refresh_jobs: jobs, webhooks }) {
  const sorted = [...checks].sort((one, other) => ORDER.indexOf(one.kind) - ORDER.indexOf(other.kind))
  const check = ({ kind, text }) => el('li', {}, badge(WORDS[kind], TONES[kind]), el('span', {}, text))
  return [
    health ? facts(health) : null,
    el('ul', { class: 'card checks' }, sorted.map(check)),
    el('h3', {}, 'Refreshes'),
    jobs.length ? table(['View', 'When', 'Last', 'Took', 'Rows', 'Next', 'State'], jobs.map(job)) : empty('No view is refreshed on a schedule or on change.'),
    el('h3', {}, 'Webhooks'),
    webhooks.length ? table(['Webhook', 'Table', 'State', 'Lag', 'Delivered', 'Wait', 'Dead letters', 'Last error'], webhooks.map(webhook)) : empty('There is no webhook: select relay.webhook(…) makes one.'),
  ].filter(Boolean)
}

function facts(health) {
  const fact = (name, value) => el('div', { class: 'fact' }, el('dt', {}, name), el('dd', {}, value))
  return el('dl', { class: 'facts-grid' },
    fact('Changelog', `${bytes(health.bytes ?? 0)} of ${bytes(health.kept_bytes ?? 0)}`),
    fact('Kept for', health.kept_for ?? '–'),
    fact('Relay sleeps', health.asleep ? 'yes' : 'no'),
    fact('NOTIFY queue', `${((health.notify_queue ?? 0) * 100).toFixed(1)} %`),
    fact('Leader', health.leader ? `backend ${health.leader}` : 'none'),
    fact('Other relays', number(health.followers ?? 0)))
}

/** An interval as PostgreSQL writes it, in its largest unit. */
function interval(text) {
  const [, hours, minutes, seconds] = /^(\d+):(\d+):([\d.]+)$/.exec(text ?? '') ?? []
  return hours === undefined ? (text ?? '–') : duration(Number(hours) * 3600 + Number(minutes) * 60 + Number(seconds))
}

function job(one) {
  const when = one.every ? `every ${interval(one.every)}` : `on change, at most every ${interval(one.at_most_every)}`
  const state = one.error ? badge(one.error, 'bad') : one.unheard?.length ? badge(one.unheard.join('; '), 'bad') : one.dirty_since ? badge('to be refreshed', 'warn') : badge('ok', 'good')
  const at = (text) => (text ? time(new Date(text)) : '–')
  return [el('strong', {}, one.relation), when, at(one.last_run), interval(one.duration), one.rows_changed ?? '–', at(one.next_run), state]
}

function webhook(one) {
  const tone = { delivering: 'good', failing: 'warn', paused: 'warn' }[one.state] ?? 'bad'
  return [el('strong', {}, one.name), one.relation, badge(one.state, one.dead_letters && tone === 'good' ? 'warn' : tone), duration(one.lag ?? 0), number(one.delivered), number(one.waiting), number(one.dead_letters), one.error ?? '–']
}

export const settings = {
  id: 'settings',
  title: 'Settings',
  about: 'The settings of this relay. Secrets and addresses with passwords are never shown.',
  show(room) {
    const place = el('div', { class: 'list' }, empty('Reading…'))
    const search = el('input', { type: 'search', placeholder: 'Search', 'aria-label': 'Search', input: () => draw() })
    let all = []
    const draw = () => {
      const like = search.value.toLowerCase()
      const fits = all.filter((one) => `${one.name} ${one.help}`.toLowerCase().includes(like))
      place.replaceChildren(table(['Setting', 'Value', 'What it is'], fits.map(setting)))
    }
    ask('settings').then((answer) => {
      // Those that were set come first.
      all = [...answer].sort((one, other) => (one.value === null) - (other.value === null))
      draw()
    }, (error) => place.replaceChildren(problem(error)))
    room.append(el('div', { class: 'tools' }, search), place)
  },
}

function setting({ name, variable, help, value }) {
  const [, text, fallback] = /^(.*?)(?: ?\[default: (.*)\])?$/s.exec(help)
  const shown = value === null ? el('span', { class: 'hint' }, fallback ?? 'not set') : el('strong', {}, Array.isArray(value) ? value.join(', ') : String(value))
  return [[el('code', {}, `--${name}`), el('small', {}, variable)], shown, text]
}
