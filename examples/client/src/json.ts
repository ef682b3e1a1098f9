// JSON with numbers as PostgreSQL wrote them: an integer that a double cannot hold becomes a bigint, such a decimal its text.

const TOKENS = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?/g
// Begins with a character that JSON text never has unescaped, so that no string of a row is taken for it.
const MARK = '\u0000number:'

const digits = (text: string) => text.replace(/^-/, '').replace(/e.*$/i, '').replace('.', '').replace(/^0+|0+$/g, '')

function isExact(text: string): boolean {
  const number = Number(text)
  return /^-?\d+$/.test(text) ? Number.isSafeInteger(number) : Number.isFinite(number) && digits(String(number)) === digits(text)
}

function revive(_: string, value: unknown): unknown {
  if (typeof value !== 'string' || !value.startsWith(MARK)) return value
  const text = value.slice(MARK.length)
  return /^-?\d+$/.test(text) ? BigInt(text) : text
}

/** Parses JSON without losing a digit. */
export function parseExactly(text: string): any {
  let isMarked = false
  const marked = text.replace(TOKENS, (token) => {
    if (token[0] === '"' || token.length < 16 || isExact(token)) return token
    isMarked = true
    return JSON.stringify(MARK + token)
  })
  return isMarked ? JSON.parse(marked, revive) : JSON.parse(text)
}
