// Why a user receives a row or not: the answer of `relay explain`, policy by policy.
import { ask, watched } from './api.js'
import { badge, choice, copier, duration, el, empty, field, inline, problem } from './elements.js'

const OPERATIONS = { I: 'INSERT', U: 'UPDATE', D: 'DELETE' }

/** What the form has, kept while the page is open, and filled by other panes. */
const asked = { table: '', row: 'any', key: '', image: '', change: '', who: 'user', sub: '', role: 'authenticated', token: '', claims: '', filter: '' }

/** Opens the pane with the form filled. */
export function askWhy(filled) {
  Object.assign(asked, filled)
  location.hash = '#why'
}

export const why = {
  id: 'why',
  title: 'Why',
  about: 'Why a subscriber receives a row of a table, or does not: by the table’s own policies, as they are now.',
  show(room) {
    const answer = el('div', { class: 'answer', 'aria-live': 'polite' })
    room.append(form(answer), answer)
  },
}

/** An input bound to a field of the form. */
function bound(name, attributes = {}, kind = 'input') {
  const input = el(kind, { name, autocomplete: 'off', spellcheck: 'false', ...attributes, input: () => { asked[name] = input.value } })
  input.value = asked[name]
  return input
}

function form(answer) {
  const known = el('datalist', { id: 'tables' })
  const recent = el('select', { name: 'change', change: () => { asked.change = recent.value } })
  const row = el('div', { class: 'part' })
  const who = el('div', { class: 'part' })
  const readChanges = async () => {
    if (asked.row !== 'change') return
    recent.replaceChildren(el('option', { value: '' }, 'reading…'))
    try {
      const { changes } = await ask('last-changes', { table: asked.table })
      const options = changes.map((change) => el('option', { value: `${change.number} ${change.xid}` }, told(change)))
      recent.replaceChildren(...(options.length ? options : [el('option', { value: '' }, 'none in the changelog')]))
      asked.change = recent.value
    } catch (error) {
      recent.replaceChildren(el('option', { value: '' }, error.message))
    }
  }
  const showRow = () => {
    const inputs = {
      any: el('p', { class: 'hint' }, 'Whether the subscriber may receive rows at all, and what keeps them back.'),
      key: bound('key', { required: true, placeholder: '7 or {"id": 7}', 'aria-label': 'Key of the row' }),
      image: bound('image', { required: true, rows: 4, 'aria-label': 'The row as JSON', placeholder: '{"id": 7, …} with all columns' }, 'textarea'),
      change: recent,
    }
    row.replaceChildren(choice('row', [['any', 'Any row'], ['key', 'By key'], ['change', 'A recent change'], ['image', 'As JSON']], asked.row, (value) => {
      asked.row = value
      showRow()
    }), inputs[asked.row])
    readChanges()
  }
  const showWho = () => {
    const inputs = {
      user: el('div', { class: 'pair' }, bound('sub', { placeholder: 'sub, such as a UUID', 'aria-label': 'sub' }), bound('role', { placeholder: 'role', 'aria-label': 'role' })),
      token: bound('token', { rows: 3, placeholder: 'eyJ…', 'aria-label': 'Token' }, 'textarea'),
      claims: bound('claims', { rows: 3, placeholder: '{"sub": "…", "role": "authenticated", "org": 7}', 'aria-label': 'Claims' }, 'textarea'),
      connected: el('p', { class: 'hint' }, 'All who follow the table at this relay now, with their own claims and filters.'),
    }
    who.replaceChildren(choice('who', [['user', 'A user'], ['token', 'A token'], ['claims', 'Claims'], ['connected', 'All connected']], asked.who, (value) => {
      asked.who = value
      showWho()
    }), inputs[asked.who])
  }
  const table = bound('table', { list: 'tables', required: true, placeholder: 'public.todos', change: readChanges })
  watched().then((relations) => {
    known.replaceChildren(...relations.map((relation) => el('option', { value: relation.name })))
    if (!asked.table && relations.length === 1) asked.table = table.value = relations[0].name
  }, () => {})
  showRow()
  showWho()
  const submit = async (event) => {
    event.preventDefault()
    answer.replaceChildren(empty('Asking…'))
    try {
      const { parameters, headers } = question()
      answer.replaceChildren(...answered(await ask('explain', parameters, headers)))
    } catch (error) {
      answer.replaceChildren(problem(error))
    }
  }
  return el('form', { class: 'card asking', submit },
    field('Table', el('div', {}, table, known)),
    el('div', { class: 'field' }, el('span', { class: 'label' }, 'Row'), row),
    el('div', { class: 'field' }, el('span', { class: 'label' }, 'Who'), who),
    el('details', { open: asked.filter !== '' }, el('summary', {}, 'With a filter'), bound('filter', { placeholder: 'status=eq.open', 'aria-label': 'Filter' })),
    el('button', { class: 'main' }, 'Why?'))
}

/** A change in words. */
function told(change) {
  const age = duration(Math.max(0, (Date.now() - Date.parse(change.at)) / 1000))
  const key = change.key ? Object.entries(change.key).map(([name, value]) => `${name} ${typeof value === 'object' ? inline(value) : value}`).join(', ') : 'no key'
  return `${OPERATIONS[change.operation]} ${key}, ${age} ago`
}

/** The form as a request. A token goes into a header, never into the address. */
function question() {
  const parameters = { table: asked.table.trim(), filter: asked.filter }
  const headers = {}
  if (asked.row === 'key') parameters.key = asked.key
  if (asked.row === 'image') parameters.row = asked.image
  if (asked.row === 'change') {
    if (!asked.change) throw new Error('There is no change to ask about.')
    ;[parameters.number, parameters.txid] = asked.change.split(' ')
  }
  if (asked.who === 'user') Object.assign(parameters, { sub: asked.sub.trim(), role: asked.role.trim() })
  if (asked.who === 'claims') {
    const claims = JSON.parse(asked.claims || '{}')
    parameters.claims = JSON.stringify(claims)
    parameters.role = claims.role
    parameters.sub = claims.sub
  }
  if (asked.who === 'token') headers['explained-token'] = asked.token.trim()
  if (asked.who === 'connected') {
    parameters.connected = 'true'
    delete parameters.filter
  }
  return { parameters, headers }
}

function answered(answer) {
  if (!answer.connected && !answer.verdicts) return [verdict(answer)]
  const verdicts = answer.connected ?? answer.verdicts
  if (!verdicts.length) return [empty('Nobody follows this table at this relay now.')]
  const sum = answer.connected ? el('p', { class: 'sum' }, `${answer.channels_receiving} channels would receive it`, answer.left_off ? `; ${answer.left_off} more users are not shown` : '', '.') : null
  const each = (one) => {
    const who = one.sub ?? one.role
    const filter = one.filter ? `, where ${one.filter}` : ''
    const channels = one.channels > 1 ? `, ${one.channels} channels` : ''
    return el('details', { class: 'card one' },
      el('summary', {}, badge(one.would_receive ? 'receives' : 'does not', one.would_receive ? 'good' : 'bad'), el('span', {}, who, el('small', {}, `${filter}${channels}`))),
      verdict(one))
  }
  return [sum, ...verdicts.map(each)].filter(Boolean)
}

/** One verdict, with all that decided it. */
export function verdict(answer) {
  const { explanation } = answer
  const more = answer.reasons.filter((reason) => reason !== explanation.verdict)
  const said = answer.would_receive ? 'Would receive' : 'Would not receive'
  const row = explanation.row
  const isAboutRow = row && row.found
  return el('article', { class: `verdict ${answer.would_receive ? 'good' : 'bad'}` },
    el('h3', {}, said, el('small', {}, `${answer.sub ?? 'no sub'} as ${answer.role} · ${explanation.table}`)),
    answer.would_receive
      ? el('p', {}, isAboutRow && row.by.length ? `This row, by ${row.by.join(' and ')}.` : isAboutRow ? 'This row.' : 'Nothing known rules rows out.')
      : el('p', { class: 'reason' }, explanation.verdict ?? ''),
    more.map((reason) => el('p', { class: 'reason' }, reason)),
    explanation.policies.length ? el('h4', {}, 'Policies') : null,
    explanation.policies.map(policy),
    explanation.filter ? el('div', { class: 'policy' },
      el('div', { class: 'line' }, el('strong', {}, 'Filter'), row && row.matches !== null ? badge(row.matches ? 'matches' : 'does not match', row.matches ? 'good' : 'bad') : null),
      el('code', { class: 'block' }, explanation.filter.text)) : null,
    decided(explanation))
}

function policy(part) {
  const says = part.says === null || part.says === undefined ? null : badge(part.says === 'yes' ? 'yes' : part.says, part.says === 'yes' ? 'good' : 'bad')
  const claims = part.claims.map((claim) => el('div', { class: 'claim' }, el('code', {}, claim.claim), ' is ',
    claim.value === null ? el('em', {}, 'not in the token') : el('code', {}, inline(claim.value))))
  return el('div', { class: 'policy' },
    el('div', { class: 'line' }, el('strong', {}, part.name), part.kind === 'restrictive' ? badge('restrictive', 'warn') : null, says),
    el('code', { class: 'block' }, part.condition), claims)
}

/** How the policies are decided, for those who look at cost. */
export function decided(explanation) {
  if (!explanation.way) return null
  const lines = [
    ['Way', explanation.way],
    ['A change finds it by', explanation.index === null ? 'every change of the table is evaluated' : explanation.index.join('; ') || 'nothing: no row can be seen'],
    ['Claims read', explanation.claims_read === null ? 'it may be any' : explanation.claims_read.join(', ') || 'none'],
    ['Asked of PostgreSQL', explanation.questions.join('; ') || 'nothing'],
    ['Columns never sent', explanation.hidden_columns.join(', ') || 'none'],
    ...explanation.obstacles.map((obstacle) => ['No cheaper way', `${obstacle.why}: ${obstacle.part}`]),
  ]
  return el('details', { class: 'decided' }, el('summary', {}, 'How it is decided'), el('dl', {}, lines.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, value)])),
    copier(JSON.stringify(explanation, null, 2), 'Copy as JSON'))
}
