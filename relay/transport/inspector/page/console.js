// A subscription as a user: what arrives with a user's own token.
import { follow, watched } from './api.js'
import { choice, copier, el, field, problem } from './elements.js'
import { into, tail } from './changes.js'

/** What the form has, kept while the page is open. */
const wanted = { token: '', kind: 'table', table: '', filter: '', topic: '', isPrivate: false }

export const console = {
  id: 'console',
  title: 'Console',
  about: 'Subscribe as a user, with the token of that user, and see what arrives.',
  show(room) {
    let stop = () => {}
    const state = el('span', { class: 'state' })
    const list = tail([state])
    const known = el('datalist', { id: 'console-tables' })
    watched().then((relations) => known.replaceChildren(...relations.map((relation) => el('option', { value: relation.name }))), () => {})
    const input = (name, attributes) => {
      const element = el(name === 'token' ? 'textarea' : 'input', { name, autocomplete: 'off', spellcheck: 'false', ...attributes, input: () => {
        wanted[name] = element.value
        if (name === 'token') tell()
      } })
      element.value = wanted[name]
      return element
    }
    const who = el('div', { class: 'claims', 'aria-live': 'polite' })
    const tell = () => who.replaceChildren(...said(wanted.token.trim()))
    const what = el('div', { class: 'part' })
    const show = () => {
      const isPrivate = el('input', { type: 'checkbox', checked: wanted.isPrivate, change: () => { wanted.isPrivate = isPrivate.checked } })
      what.replaceChildren(choice('kind', [['table', 'A table'], ['topic', 'A topic']], wanted.kind, (kind) => {
        wanted.kind = kind
        show()
      }), ...(wanted.kind === 'table'
        ? [input('table', { list: 'console-tables', required: true, placeholder: 'public.todos', 'aria-label': 'Table' }), input('filter', { placeholder: 'Filter, such as status=eq.open', 'aria-label': 'Filter' })]
        : [input('topic', { required: true, placeholder: 'room1', 'aria-label': 'Topic' }), el('label', { class: 'check' }, isPrivate, 'private')]))
    }
    const subscribe = (event) => {
      event.preventDefault()
      stop()
      const name = wanted.table.trim()
      const filter = wanted.filter.trim()
      const parameters = wanted.kind === 'table'
        ? { tables: name, ...(filter ? { [`${name}.filter`]: filter } : {}) }
        : { topic: wanted.topic, private: String(wanted.isPrivate) }
      stop = follow('changes', parameters, { event: into(list), state: (text, tone) => {
        state.textContent = text
        state.dataset.tone = tone
      } }, wanted.token.trim())
    }
    tell()
    show()
    room.append(el('form', { class: 'card asking', submit: subscribe },
      field('Token or claims', input('token', { rows: 3, required: true, placeholder: 'eyJ…, or {"sub": "…"}' })), who,
      el('div', { class: 'field' }, el('span', { class: 'label' }, 'Of'), what, known),
      el('button', { class: 'main' }, 'Subscribe')), list.element)
    return () => stop()
  },
}

/** What a token says; for claims, the command that makes a token of them. */
function said(text) {
  if (!text) return []
  if (text.startsWith('{')) {
    try {
      const { sub, role, ...more } = JSON.parse(text)
      const quoted = (value) => `'${String(value).replaceAll("'", "'\\''")}'`
      const command = ['relay token', sub ? `--sub ${quoted(sub)}` : '', role ? `--role ${quoted(role)}` : '', Object.keys(more).length ? `--claims ${quoted(JSON.stringify(more))}` : ''].filter(Boolean).join(' ')
      return [el('p', { class: 'hint' }, 'Only the holder of the secret can make a token of claims. Run this, and paste what it prints:'), el('div', { class: 'command' }, el('code', { class: 'block' }, command), copier(command))]
    } catch (error) {
      return [problem(error)]
    }
  }
  try {
    const claims = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(text.split('.')[1].replaceAll('-', '+').replaceAll('_', '/')), (letter) => letter.charCodeAt(0))))
    const ends = claims.exp ? (claims.exp * 1000 > Date.now() ? `until ${new Date(claims.exp * 1000).toLocaleString()}` : 'expired') : 'without an end'
    return [el('p', { class: 'hint' }, `${claims.sub ?? 'no sub'} as ${claims.role ?? 'no role'}, ${ends}`)]
  } catch {
    return []
  }
}
