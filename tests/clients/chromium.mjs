// The Chromium of this machine, without a window.
import { accessSync, constants } from 'node:fs'
import { delimiter, join } from 'node:path'
import { chromium } from 'playwright-core'

/** The names that tests/support/setup.sh knows too. */
function browser() {
  const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable']
  const inPath = names.flatMap((name) => process.env.PATH.split(delimiter).map((folder) => join(folder, name)))
  for (const path of [process.env.CHROMIUM, ...inPath].filter(Boolean)) {
    try {
      accessSync(path, constants.X_OK)
      return path
    } catch {}
  }
  throw new Error('there is no Chromium: `make setup` installs it')
}

export const launch = () => chromium.launch({ executablePath: browser(), headless: true, chromiumSandbox: false })
