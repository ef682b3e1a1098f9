// Who is connected with which channels, and the topics with their members.
import { ask, repeat } from './api.js'
import { badge, bytes, choice, copier, duration, el, empty, number, problem, table } from './elements.js'

const PAGE = 50
const TRANSPORTS = { websocket: 'WebSocket', event_stream: 'event stream', poll: 'poll' }

const counted = (count, name) => `${count} ${name}${count === 1 ? '' : 's'}`

/** A list that is read again and again, with a search, unless it is paused. */
function list(room, controls, every, read) {
  const state = { like: '', offset: 0, isPaused: false }
  const place = el('div', { class: 'list' })
  const search = el('input', { type: 'search', placeholder: 'Search', 'aria-label': 'Search', input: () => {
    Object.assign(state, { like: search.value, offset: 0 })
    now()
  } })
  const pause = el('button', { type: 'button', 'aria-pressed': 'false', click: () => {
    state.isPaused = !state.isPaused
    pause.setAttribute('aria-pressed', String(state.isPaused))
    pause.textContent = state.isPaused ? 'Go on' : 'Pause'
  } }, 'Pause')
  let turn = 0
  const now = async () => {
    const mine = ++turn
    try {
      const shown = await read(state)
      if (mine === turn) place.replaceChildren(...shown)
    } catch (error) {
      if (mine === turn) place.replaceChildren(problem(error))
    }
  }
  room.append(el('div', { class: 'tools' }, search, controls(state, now), pause), place)
  return repeat(every, () => (state.isPaused ? null : now()))
}

/** Buttons to other parts of a list, if it has any. */
function pager(state, count, now) {
  if (count <= PAGE) return null
  const move = (by) => el('button', { type: 'button', disabled: state.offset + by < 0 || state.offset + by >= count, click: () => {
    state.offset += by
    now()
  } }, by < 0 ? 'Before' : 'After')
  return el('div', { class: 'pager' }, move(-PAGE), `${state.offset + 1} to ${Math.min(count, state.offset + PAGE)} of ${count}`, move(PAGE))
}

export const clients = {
  id: 'clients',
  title: 'Clients',
  about: 'Who is connected to this relay now, what waits for them, and how far they are.',
  show(room) {
    const open = new Set()
    let again = () => {}
    const controls = (state, now) => {
      again = now
      state.order = 'queued'
      return choice('order', [['queued', 'Most queued'], ['lag', 'Furthest behind'], ['newest', 'Newest'], ['channels', 'Most channels']], 'queued', (order) => {
        Object.assign(state, { order, offset: 0 })
        now()
      })
    }
    return list(room, controls, 2000, async (state) => {
      const [answer, overview] = await Promise.all([
        ask('clients', { order: state.order, like: state.like, offset: state.offset, limit: PAGE }), ask('overview')])
      const counts = Object.entries(overview.clients).map(([kind, count]) => counted(count, TRANSPORTS[kind])).join(' · ')
      const sum = el('p', { class: 'sum' }, `${counts} · ${bytes(overview.queued_bytes)} queued of ${bytes(overview.max_queued_bytes)}`)
      if (!answer.clients.length) return [sum, empty(state.like ? 'No client is like that.' : 'Nobody is connected.')]
      const rows = answer.clients.map((client) => card(client, overview, open))
      return [sum, ...rows, pager(state, answer.count, again)].filter(Boolean)
    })
  },
}

function card(client, overview, open) {
  const { number: id } = client
  const behind = client.lag_seconds === null ? null : badge(`${duration(client.lag_seconds)} behind`, client.lag_seconds > 1 ? 'bad' : 'warn')
  const isFull = client.queued_bytes > overview.max_queued_bytes_each / 2
  const queued = client.queued_bytes ? badge(`${bytes(client.queued_bytes)} queued`, isFull ? 'bad' : '') : null
  const summary = el('summary', {},
    el('span', { class: 'who' }, client.sub ?? 'no sub', el('small', {}, client.role)),
    el('span', { class: 'facts' }, behind, queued, el('span', {}, TRANSPORTS[client.transport]), el('span', {}, counted(client.channel_count, 'channel')), el('span', {}, duration(client.age_seconds))))
  const details = el('details', { class: 'card one', open: open.has(id), toggle: () => (details.open ? open.add(id) : open.delete(id)) }, summary,
    el('p', { class: 'hint' }, `Session ${id} from ${client.address}.`),
    client.channels.map((channel) => described(channel, client)),
    client.channel_count > client.channels.length ? el('p', { class: 'hint' }, `${client.channel_count - client.channels.length} more channels.`) : null)
  return details
}

function described(channel, client) {
  const other = channel.sub !== null && channel.sub !== client.sub ? badge(`as ${channel.sub}`) : null
  const bindings = (channel.tables ?? []).map((one) => el('div', {}, el('code', {}, one.table), one.filter ? [' where ', el('code', {}, one.filter)] : null, one.is_refused ? badge('refused', 'bad') : null))
  const cursor = channel.cursor ? el('div', { class: 'cursor' }, el('code', { title: channel.cursor }, channel.cursor), copier(channel.cursor, 'Copy cursor')) : null
  return el('div', { class: 'policy' },
    el('div', { class: 'line' }, el('strong', {}, channel.topic), channel.is_private ? badge('private') : null, other, channel.is_replayed ? badge('reads what it missed', 'warn') : null),
    bindings.length ? bindings : el('div', { class: 'hint' }, 'Broadcasts and presence.'), cursor)
}

export const topics = {
  id: 'topics',
  title: 'Topics',
  about: 'Members and rates of each topic. Rates are of broadcasts from clients and over HTTP.',
  show(room) {
    let before = { at: 0, counts: new Map() }
    let again = () => {}
    const controls = (_, now) => {
      again = now
      return null
    }
    return list(room, controls, 2000, async (state) => {
      const answer = await ask('topics', { like: state.like, offset: state.offset, limit: PAGE })
      const at = performance.now()
      const seconds = (at - before.at) / 1000
      const known = before.counts
      before = { at, counts: new Map(answer.topics.map((topic) => [`${topic.is_private} ${topic.topic}`, topic])) }
      if (!answer.topics.length) return [empty(state.like ? 'No topic is like that.' : 'No topic has members.')]
      const rows = answer.topics.map((topic) => {
        const earlier = known.get(`${topic.is_private} ${topic.topic}`)
        const rate = (name) => (earlier && topic[name] >= earlier[name] ? (topic[name] - earlier[name]) / seconds : 0)
        return [[el('strong', {}, topic.topic), topic.is_private ? badge('private') : ''], number(topic.members), number(topic.present), `${number(rate('broadcasts'))}/s`, `${bytes(rate('bytes'))}/s`, number(topic.broadcasts)]
      })
      return [table(['Topic', 'Members', 'Present', 'Broadcasts', 'Bytes', 'Total'], rows), pager(state, answer.count, again)].filter(Boolean)
    })
  },
}
