// The changes of all tables as they come, and those of one subscriber in the console.
import { follow, watched } from './api.js'
import { badge, el, empty, inline, problem, time } from './elements.js'
import { askWhy } from './why.js'

/** Changes that are kept. */
const KEPT = 500
const TONES = { INSERT: 'good', UPDATE: 'warn', DELETE: 'bad' }

/** A list of events, the newest first, with search and pause. Returns its element, and how to add to it. */
export function tail(lead = []) {
  const events = []
  const waiting = []
  let isPaused = false
  let like = ''
  const place = el('div', { class: 'events' })
  const nothing = empty('Nothing yet. Changes show here as they are written.')
  const search = el('input', { type: 'search', placeholder: 'Search', 'aria-label': 'Search', input: () => {
    like = search.value.toLowerCase()
    draw()
  } })
  const pause = el('button', { type: 'button', 'aria-pressed': 'false', click: () => {
    isPaused = !isPaused
    pause.setAttribute('aria-pressed', String(isPaused))
    if (!isPaused) {
      waiting.splice(0).forEach(keep)
      draw()
    }
    label()
  } })
  const label = () => { pause.textContent = isPaused ? `Go on${waiting.length ? ` (${waiting.length})` : ''}` : 'Pause' }
  const clear = el('button', { type: 'button', click: () => {
    events.length = 0
    draw()
  } }, 'Clear')
  const fits = (event) => like === '' || event.text.includes(like)
  const keep = (event) => {
    events.unshift(event)
    events.length = Math.min(events.length, KEPT)
  }
  const draw = () => {
    const shown = events.filter(fits).map((event) => event.element)
    place.replaceChildren(...(shown.length ? shown : [events.length ? empty('No change is like that.') : nothing]))
  }
  const add = (element, text) => {
    const event = { element, text: text.toLowerCase() }
    if (isPaused) {
      waiting.push(event)
      if (waiting.length > KEPT) waiting.shift()
      return label()
    }
    keep(event)
    nothing.remove()
    if (fits(event)) place.prepend(element)
    while (place.children.length > KEPT) place.lastElementChild.remove()
  }
  label()
  draw()
  return { add, element: el('div', {}, el('div', { class: 'tools' }, lead, search, pause, clear), place) }
}

/** A change, in one line and with both rows below it. */
export function changed(change) {
  const { schema, table, type, record, old_record: old } = change
  const differs = (name) => type === 'UPDATE' && old && name in old && JSON.stringify(old[name]) !== JSON.stringify(record[name])
  const row = record && Object.keys(record).length ? record : (old ?? {})
  const names = [...new Set([...Object.keys(row), ...Object.keys(old ?? {})])]
  const lines = names.flatMap((name) => [el('dt', {}, name), el('dd', {}, differs(name) ? [el('del', {}, inline(old[name])), ' '] : '', el('span', {}, inline(row[name] ?? null, 2000)))])
  return el('details', { class: 'event' },
    el('summary', {}, el('time', {}, time(new Date(change.commit_timestamp))), badge(type, TONES[type]), el('strong', {}, schema === 'public' ? table : `${schema}.${table}`), el('span', { class: 'gist' }, inline(row))),
    el('dl', {}, lines),
    type === 'DELETE' ? null : el('button', { type: 'button', class: 'quiet', click: () => askWhy({ table: `"${schema}"."${table}"`, row: 'image', image: JSON.stringify(record), who: 'connected' }) }, 'Who receives this row?'))
}

/** Anything else that a stream tells. */
export function noticed(name, data) {
  return el('div', { class: 'event note' }, el('time', {}, time(new Date())), badge(name, name === 'broadcast' ? 'good' : 'warn'), el('span', { class: 'gist' }, data.error ?? data.message ?? inline(data, 2000)))
}

/** Handles the events of a stream by adding them to a tail. */
export const into = (list) => (name, data) => {
  if (name === 'change') list.add(changed(data), inline(data, 1e5))
  else list.add(noticed(name, data), `${name} ${inline(data)}`)
}

export const changes = {
  id: 'changes',
  title: 'Changes',
  about: 'All changes as they are written, as the role service_role sees them.',
  show(room) {
    let stop = () => {}
    const state = el('span', { class: 'state' })
    const which = el('select', { 'aria-label': 'Table', change: () => begin() })
    const list = tail([state, which])
    const begin = () => {
      stop()
      stop = follow('changes', which.value ? { tables: which.value } : {}, { event: into(list), state: (text, tone) => {
        state.textContent = text
        state.dataset.tone = tone
      } })
    }
    let isLeft = false
    watched(true).then((relations) => {
      if (isLeft) return
      const readable = relations.filter((relation) => relation.roles.service_role)
      const unreadable = relations.filter((relation) => !relation.roles.service_role)
      if (unreadable.length) room.insertBefore(el('p', { class: 'hint' }, 'Not shown, because service_role may not read them: ', unreadable.map((relation) => el('code', {}, relation.name)), '. For one: ', el('code', {}, `grant select on ${unreadable[0].name} to service_role`)), list.element)
      if (!readable.length) return list.element.replaceChildren(empty(relations.length ? 'There is no table to show.' : 'No table is watched: select relay.watch(\'…\').'))
      const all = readable.map((relation) => relation.name)
      which.replaceChildren(el('option', { value: all.slice(0, 100).join(',') }, 'All tables'), ...all.map((name) => el('option', { value: name }, name)))
      begin()
    }, (error) => list.element.replaceChildren(problem(error)))
    room.append(list.element)
    return () => {
      isLeft = true
      stop()
    }
  },
}
