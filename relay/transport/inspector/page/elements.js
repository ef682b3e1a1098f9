// Elements of the page, and how numbers and times are written.

/** An element. Attributes that are functions are handlers; `false` and `null` leave one out. Children are nodes or texts. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name)
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue
    if (typeof value === 'function') element.addEventListener(key, value)
    else if (key in element && typeof value === 'boolean') element[key] = value
    else element.setAttribute(key, value === true ? '' : value)
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false))
  return element
}

/** An element of SVG. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  element.append(...children.flat())
  return element
}

/** A small word in a frame; `tone` is good, bad, warn, or nothing. */
export const badge = (text, tone = '') => el('span', { class: `badge ${tone}` }, text)

/** A message in place of content. */
export const empty = (...children) => el('p', { class: 'empty' }, ...children)

/** An error with what to do, as the relay words it. */
export const problem = (error) => el('p', { class: 'problem', role: 'alert' }, error.message ?? String(error))

/** A label above an input. */
export const field = (label, input, hint) =>
  el('label', { class: 'field' }, el('span', { class: 'label' }, label), input, hint ? el('span', { class: 'hint' }, hint) : null)

/** A choice of one among few. Calls `changed` with the chosen value. */
export function choice(name, options, chosen, changed) {
  const option = ([value, text]) => {
    const input = el('input', { type: 'radio', name, value, checked: value === chosen, change: () => changed(value) })
    return el('label', {}, input, el('span', {}, text))
  }
  return el('div', { class: 'choice', role: 'radiogroup' }, options.map(option))
}

/** A table that becomes a list of cards where the page is narrow. Each row is a list of cells; `details` may follow a row. */
export function table(headings, rows) {
  const cells = (row) => row.map((cell, index) => el('td', { 'data-label': headings[index] }, ...[cell].flat()))
  return el('table', {}, el('thead', {}, el('tr', {}, headings.map((heading) => el('th', {}, heading)))), el('tbody', {}, rows.map((row) => el('tr', {}, cells(row)))))
}

/** A button that copies a text. */
export function copier(text, title = 'Copy') {
  const button = el('button', { type: 'button', class: 'quiet', click: async () => {
    await navigator.clipboard.writeText(text)
    button.textContent = 'Copied'
    setTimeout(() => { button.textContent = title }, 1500)
  } }, title)
  return button
}

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB']

export function bytes(count) {
  let unit = 0
  while (count >= 1024 && unit < UNITS.length - 1) {
    count /= 1024
    unit += 1
  }
  return `${unit === 0 || count >= 100 ? Math.round(count) : count.toFixed(1)} ${UNITS[unit]}`
}

/** A duration in its largest units. */
export function duration(seconds) {
  if (seconds < 0.001) return `${(seconds * 1e6).toFixed(0)} µs`
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 1 : 0)} ms`
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`
}

export function number(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1)
}

export const time = (date) => date.toLocaleTimeString([], { hour12: false })

/** A JSON value in one line, shortened. */
export function inline(value, most = 160) {
  const text = JSON.stringify(value) ?? ''
  return text.length > most ? `${text.slice(0, most)}…` : text
}
