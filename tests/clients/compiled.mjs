// The helper of examples/client, compiled into a folder of its own.
import { execFileSync } from 'node:child_process'
import { mkdtempSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const EXAMPLES = join(dirname(fileURLToPath(import.meta.url)), '../../examples')

/** Compiles it, and returns the folder with its modules. */
export function compile() {
  const client = join(EXAMPLES, 'client')
  const folder = mkdtempSync(join(process.env.TMP_FOLDER, 'live-'))
  execFileSync(join(client, 'node_modules/.bin/tsc'), ['-p', client, '--outDir', folder], { stdio: ['ignore', 2, 2] })
  writeFileSync(join(folder, 'package.json'), '{ "type": "module" }')
  symlinkSync(join(client, 'node_modules'), join(folder, 'node_modules'))
  return folder
}
