// The watched tables, and how the policies of each role are decided.
import { ask, watched } from './api.js'
import { badge, el, empty, problem } from './elements.js'
import { askWhy, verdict } from './why.js'

const KINDS = { r: 'table', p: 'partitioned table', m: 'materialized view', f: 'foreign table' }
const TONES = { compiled: 'good', inverted: 'good', 'one by one': 'warn' }

export const policies = {
  id: 'policies',
  title: 'Policies',
  about: 'Watched tables, and how the policies of each role are decided. Compiled ones cost PostgreSQL nothing, inverted ones a query a page, others a query for each user.',
  show(room) {
    const place = el('div', { class: 'list' }, empty('Reading…'))
    const search = el('input', { type: 'search', placeholder: 'Search', 'aria-label': 'Search', input: () => {
      for (const card of place.children) card.hidden = !card.dataset.name?.includes(search.value.toLowerCase())
    } })
    watched(true).then((relations) => {
      place.replaceChildren(...(relations.length ? relations.map(card) : [empty('No table is watched: ', el('code', {}, 'select relay.watch(\'public.your_table\')'))]))
    }, (error) => place.replaceChildren(problem(error)))
    room.append(el('div', { class: 'tools' }, search), place)
  },
}

function card(relation) {
  const roles = Object.entries(relation.roles)
  const ways = roles.map(([role, access]) => el('span', { class: 'way' }, role, ' ', access.missing ? badge('lacks a grant', 'bad') : badge(access.sees_all ? 'every row' : access.way, access.sees_all ? '' : TONES[access.way])))
  const inside = el('div', {})
  const details = el('details', { class: 'card one', 'data-name': relation.name.toLowerCase(), toggle: async () => {
    if (!details.open || inside.children.length) return
    inside.append(empty('Reading…'))
    try {
      const answers = await Promise.all(Object.keys(relation.roles).map((role) => ask('explain', { table: relation.name, role })))
      inside.replaceChildren(...answers.map(verdictOfRole))
    } catch (error) {
      inside.replaceChildren(problem(error))
    }
  } },
  el('summary', {}, el('span', { class: 'who' }, relation.name, el('small', {}, `${KINDS[relation.kind] ?? relation.kind}, ${relation.key.length ? `key ${relation.key.join(', ')}` : 'no key'}`)),
    el('span', { class: 'facts' }, ways.length ? ways : badge('no role may read it', 'bad'))),
  el('div', { class: 'line' }, el('button', { type: 'button', class: 'quiet', click: () => askWhy({ table: relation.name }) }, 'Ask why')), inside)
  return details
}

/** What a role sees without a user: claims that its policies read are missing here. */
function verdictOfRole(answer) {
  const shown = verdict(answer)
  shown.className = 'verdict'
  if (!answer.explanation.blockers.length) shown.querySelectorAll(':scope > p').forEach((said) => said.remove())
  shown.querySelector('h3').replaceChildren(answer.role)
  return shown
}
