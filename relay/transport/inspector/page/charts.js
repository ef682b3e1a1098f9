// Charts of rate, latency and load, from the same metrics that Prometheus reads.
import { askText } from './api.js'
import { bytes, duration, el, empty, number, svg } from './elements.js'

/** Samples that are kept: five minutes. */
const KEPT = 150
const samples = []

/** Reads the metrics once more. The page does so from the start, so that a chart has a past when it is opened. */
export async function sample() {
  samples.push({ at: performance.now() / 1000, values: parse(await askText('metrics')) })
  if (samples.length > KEPT) samples.shift()
}

/** Metrics by name; those with labels under their name with the labels, and summed up under their name alone. */
export function parse(text) {
  const values = new Map()
  for (const line of text.split('\n')) {
    const [, name, labels, value] = /^(\w+)(\{[^}]*\})? (\S+)/.exec(line) ?? []
    if (!name) continue
    if (labels) values.set(name + labels, Number(value))
    values.set(name, (labels ? (values.get(name) ?? 0) : 0) + Number(value))
  }
  return values
}

const value = (name) => (now) => now.values.get(name) ?? null

const rate = (name) => (now, before) => {
  if (!before) return null
  const more = (now.values.get(name) ?? 0) - (before.values.get(name) ?? 0)
  return more < 0 ? null : more / (now.at - before.at)
}

/** A quantile of what a histogram counted between two samples; null if that is nothing. */
const quantile = (name, share) => (now, before) => {
  if (!before) return null
  const start = `${name}_bucket{le="`
  const buckets = [...now.values].filter(([key]) => key.startsWith(start)).map(([key, count]) => {
    const bound = key.slice(start.length, -2)
    return [bound === '+Inf' ? Infinity : Number(bound), count - (before.values.get(key) ?? 0)]
  }).sort(([one], [other]) => one - other)
  const total = buckets.at(-1)?.[1] ?? 0
  if (total <= 0) return null
  const at = buckets.findIndex(([, count]) => count >= total * share)
  const [bound] = buckets[at]
  return bound === Infinity ? buckets[at - 1][0] : bound
}

const perSecond = (count) => `${number(count)}/s`

const CHARTS = [
  { title: 'Changes', write: perSecond, lines: [['read', rate('relay_changes_read_total')]] },
  { title: 'Frames', write: perSecond, lines: [['of changes', rate('relay_frames_total')], ['of broadcasts', rate('relay_broadcast_frames_total')]] },
  { title: 'From write to socket', write: duration, lines: [['p50', quantile('relay_written_lag_seconds', 0.5)], ['p99', quantile('relay_written_lag_seconds', 0.99)]] },
  { title: 'Policies in PostgreSQL', write: duration, lines: [['p50', quantile('relay_judge_seconds', 0.5)], ['p99', quantile('relay_judge_seconds', 0.99)]] },
  { title: 'Reads of the changelog', write: duration, lines: [['p50', quantile('relay_page_seconds', 0.5)], ['p99', quantile('relay_page_seconds', 0.99)]] },
  { title: 'Clients', write: number, lines: [['connected', value('relay_sessions_open')], ['channels', value('relay_channels_open')]] },
  { title: 'Sent', write: (count) => `${bytes(count)}/s`, lines: [['to clients', rate('relay_sent_bytes_total')]] },
  { title: 'Queued', write: bytes, lines: [['for clients', value('relay_outbox_bytes')]] },
  { title: 'Refused and lost', write: perSecond, lines: [['refused', rate('relay_connections_refused_total')], ['gaps', rate('relay_gaps_total')]] },
]

const WIDTH = 320
const HEIGHT = 96
/** Samples that fill the width at least. */
const SHOWN = 30

export const charts = {
  id: 'charts',
  title: 'Charts',
  about: 'The last five minutes of this page, from the metrics of the relay.',
  show(room) {
    const place = el('div', { class: 'charts' })
    const draw = () => {
      if (samples.length < 2) place.replaceChildren(empty('Measuring…'))
      else place.replaceChildren(...CHARTS.map(chart))
    }
    draw()
    room.append(place)
    const timer = setInterval(draw, 1000)
    return () => clearInterval(timer)
  },
}

function chart({ title, write, lines }) {
  const series = lines.map(([name, of]) => ({ name, points: samples.map((now, index) => of(now, samples[index - 1])) }))
  const most = Math.max(...series.flatMap(({ points }) => points.filter((point) => point !== null)), 0)
  const x = (index) => WIDTH - (samples.length - 1 - index) * (WIDTH / (Math.max(SHOWN, samples.length) - 1))
  const y = (point) => HEIGHT - 2 - (most > 0 ? (point / most) * (HEIGHT - 8) : 0)
  const drawn = series.map(({ points }, number) => {
    const parts = []
    points.forEach((point, index) => {
      if (point === null) return
      const isNew = index === 0 || points[index - 1] === null
      parts.push(`${isNew ? 'M' : 'L'}${x(index).toFixed(1)} ${y(point).toFixed(1)}${isNew ? 'h0.01' : ''}`)
    })
    return svg('path', { d: parts.join(''), class: `line-${number}` })
  })
  const now = ({ name, points }, index) => {
    const last = points.findLast((point) => point !== null)
    return el('span', { class: `key key-${index}` }, `${name} `, el('strong', {}, last === undefined ? '–' : write(last)))
  }
  return el('figure', { class: 'card chart' },
    el('figcaption', {}, el('h3', {}, title), el('div', {}, series.map(now))),
    svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `${title}, at most ${write(most)}` }, drawn),
    el('div', { class: 'most' }, most > 0 ? `at most ${write(most)}` : 'nothing'))
}
